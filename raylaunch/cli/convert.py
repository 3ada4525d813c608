"""`raylaunch convert`: the config that does what an sbatch script or a torchrun command does."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import yaml

from raylaunch.cli.show import note
from raylaunch.config.convert import from_script
from raylaunch.errors import RaylaunchError, UsageError
from raylaunch.state import files


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]})
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Output file. Default: standard output.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, required=True, metavar="FILE | - | -- COMMAND…")
def convert(output: Path | None, words: tuple[str, ...]) -> None:
    """Convert an sbatch script (FILE, or - for standard input) or a command to a configuration that does the same.

    \b
      raylaunch convert train.sbatch -o train.yaml
      raylaunch convert -- torchrun --nnodes 4 --nproc-per-node 8 train.py --lr 0.1

    What cannot be converted is printed, and added to the configuration as comments. Nothing is run or submitted.
    """
    try:
        found = from_script.script(_read(words[0])) if len(words) == 1 else from_script.command(list(words))
    except from_script.Unreadable as error:
        what = words[0] if len(words) == 1 else "the command"
        raise RaylaunchError(
            f"{what}: {error}", "Write the configuration yourself: see `trainer:` in docs/configuration.md."
        ) from error
    text = "".join(f"# check this: {line}\n" for line in found.notes)
    order = {key: found.values[key] for key in ("slurm", "elastic", "trainer") if key in found.values}
    text += yaml.safe_dump(order, sort_keys=False, width=100, allow_unicode=True)
    if output is None:
        click.echo(text, nl=False)
    else:
        files.write_text(output, text)
    for line in found.notes:
        note(f"check this: {line}")
    if output is not None:
        note(f"next: raylaunch up -c {output} && raylaunch train {output}")


def _read(name: str) -> str:
    if name == "-":
        return sys.stdin.read()
    try:
        raw = Path(name).read_bytes()
    except FileNotFoundError as error:
        raise UsageError(
            f"{name}: not a script file, and not a torchrun, srun or python command",
            "Give an sbatch script, or a complete command after `--`.",
        ) from error
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}", "Give an sbatch script, or a command after `--`.") from error
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: not text", "Give an sbatch script, or a command after `--`.") from error
