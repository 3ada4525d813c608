"""`raylaunch data`: prepare documents for training, and look at what was prepared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from raylaunch.cli.show import note
from raylaunch.errors import RaylaunchError
from raylaunch.text import plural

if TYPE_CHECKING:  # pyarrow is for the commands, not for their help
    from raylaunch.data import prepare as preparation
    from raylaunch.data.dataset import Manifest


@click.group()
def data() -> None:
    """Prepare training data, or inspect it."""


@data.command(short_help="Tokenize documents into a dataset.")
@click.argument("inputs", nargs=-1, required=True, metavar="IN…")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Output directory.")
@click.option(
    "--tokenizer",
    default="bytes",
    show_default=True,
    help="bytes, a tokenizer.json file, or hf:NAME for one from the Hugging Face Hub.",
)
@click.option(
    "--format", "format_", type=click.Choice(["text", "jsonl", "parquet", "sft", "table"]),
    help="Format of all inputs. Default: by file name: .jsonl and .parquet (also .gz, .zst), else text.",
)  # fmt: skip
@click.option("--column", default="text", show_default=True, help="Column with the text, in JSON lines and Parquet.")
@click.option(
    "--chat-template", default="auto", show_default=True,
    help="For sft: auto (the tokenizer's own, if it has one), plain (role, line break, content), or a Jinja file.",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(1), help="Number of processes. Default: the number of available CPUs.")
@click.option("--skip-bad", is_flag=True, help="Skip and count unreadable documents.")
def prepare(
    inputs: tuple[str, ...],
    out: Path,
    tokenizer: str,
    format_: Any,
    column: str,
    chat_template: str,
    workers: int | None,
    skip_bad: bool,
) -> None:
    """Tokenize documents into a dataset of Arrow shards (`data.prepared` in a configuration).

    IN are files, directories, glob patterns or URLs (s3://, gs://, https://, …). A text file is one document; in JSON
    lines and Parquet files each row is one. Format `sft`: JSON lines with "messages", or with "prompt" and "completion";
    only the answers count for the loss. Format `table`: the rows of Parquet files unchanged, for your own training loop.
    Run the same command again to resume after an interruption.

    \b
      raylaunch data prepare 'books/*.txt' wiki.jsonl.zst --out corpus --tokenizer tokenizer.json
    """
    from raylaunch.data.prepare import PrepareRequest
    from raylaunch.data.prepare import prepare as make

    request = PrepareRequest(
        [*inputs], out.absolute(), tokenizer, format_, column, skip_bad, chat_template=chat_template
    )
    with _bar() as tell:
        manifest = make(request, workers or len(os.sched_getaffinity(0)), tell)
    if manifest.skipped:
        note(f"{manifest.skipped:,} documents were skipped")
    click.echo(_summary(out, manifest))


@contextmanager
def _bar() -> Iterator[Callable[[preparation.PrepareProgress], None]]:
    """A bar on a terminal, a line for every tenth elsewhere; bad documents above it."""
    console = Console(stderr=True, highlight=False)
    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f} %  {task.fields[size]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None, size="")
        named, tenth = 0, -1

        def tell(now: preparation.PrepareProgress) -> None:
            nonlocal named, tenth
            size = f"{now.done / 1e6:,.0f} of {now.total / 1e6:,.0f} MB"
            bar.update(task, completed=now.done, total=now.total or 1, size=size)
            for bad in now.bad[named:]:
                console.print(f"skipped: {bad.where}: {bad.why}", markup=False, soft_wrap=True)
            named = len(now.bad)
            if not console.is_terminal and now.total and (reached := 10 * now.done // now.total) > tenth:
                tenth = reached
                note(size)

        yield tell


@data.command(short_help="Print a summary of a prepared dataset.")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--samples", default=3, show_default=True, type=click.IntRange(0), help="Number of documents to print.")
@click.option("--seed", default=0, show_default=True, help="Seed of the choice of documents.")
@click.option("--verify", is_flag=True, help="Read the whole dataset and compare checksums.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(directory: Path, samples: int, seed: int, verify: bool, as_json: bool) -> None:
    """Print a summary of a prepared dataset, and some of its documents as text."""
    from raylaunch.data import dataset
    from raylaunch.data import inspect as looking

    manifest = dataset.read(directory)
    damaged = dataset.verify(directory, manifest) if verify else []
    shown = looking.samples(directory, manifest, samples, seed)
    if as_json:
        facts = {"format": manifest.format, "tokenizer": manifest.tokenizer, "shards": len(manifest.shards),
                 "documents": manifest.documents, "tokens": manifest.tokens, "skipped": manifest.skipped,
                 "damaged": damaged, "samples": [vars(sample) for sample in shown]}  # fmt: skip
        click.echo(json.dumps(facts, indent=1))
    else:
        click.echo(_summary(directory, manifest))
        if verify and not damaged:
            click.echo(f"verified: {plural(sum(len(s.sha256) for s in manifest.shards), 'file')}, as written")
        for sample in shown:
            click.echo(f"\n— document {sample.index} of {sample.shard}, {sample.tokens:,} tokens, from {sample.source}")
            click.echo(sample.text)
    if damaged:
        raise RaylaunchError(
            f"{len(damaged)} files are damaged: {', '.join(damaged[:5])}",
            f"Delete {directory / dataset.MANIFEST} and these shards, then run `prepare` again.",
        )


def _summary(directory: Path, manifest: Manifest) -> str:
    if manifest.format == "table":
        return f"{directory}: {manifest.documents:,} rows in {len(manifest.shards)} shards"
    answered = sum(shard.answered for shard in manifest.shards)
    loss = f", {answered:,} of them answers" if manifest.format == "sft" else ""
    return (
        f"{directory}: {manifest.documents:,} documents, {manifest.tokens:,} tokens{loss} "
        f"({manifest.tokenizer['name']}, {manifest.dtype}) in {len(manifest.shards)} shards"
    )
