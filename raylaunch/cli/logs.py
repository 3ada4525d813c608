"""`raylaunch logs`: a run's workers and driver, or a cluster's nodes."""

from __future__ import annotations

import re
import time
from pathlib import Path

import click

from raylaunch.cli import options
from raylaunch.cluster import up
from raylaunch.errors import UsageError
from raylaunch.state import files, records
from raylaunch.state.runs import Run


@click.command()
@click.argument("name", required=False)
@click.option("-f", "--follow", is_flag=True, help="Follow the log.")
@click.option("--node", help="Only this node of a cluster, or the ranks of a run on it.")
@click.option("--rank", type=int, help="Only this rank of a run.")
@click.option("--attempt", type=int, help="Ranks of this attempt of a run. Default: the last attempt, and the driver.")
@click.option(
    "-n", "--lines", default=200, show_default=True, help="Number of lines to print from the end of each file."
)
@options.state_dir_option
def logs(
    name: str | None, follow: bool, node: str | None, rank: int | None, attempt: int | None, lines: int,
    state_dir: Path | None,
) -> None:  # fmt: skip
    """Print logs. NAME is a run (logs of its workers and its driver) or a cluster (logs of its nodes).

    Default: the most recently active run.
    """
    where = options.state_dir(state_dir)
    logs = _files(where, name, node, rank, attempt)
    if not logs:
        asked = f"node {node}" if node is not None else f"rank {rank}" if rank is not None else f"attempt {attempt}"
        there = ", ".join(sorted(path.stem for path in _files(where, name, None, None, attempt)))
        raise UsageError(f"no log of {asked}", f"Available: {there or 'nothing yet'}.")
    _print(logs, lines, follow)


def _files(where: Path, name: str | None, node: str | None, rank: int | None, attempt: int | None) -> list[Path]:
    if name is None:
        newest = sorted((where / "runs").glob(f"*/{records.RUN_FILE}"), key=lambda p: p.stat().st_mtime)
        if not newest:
            raise UsageError(f"no run in {where}", "Start one with `raylaunch train`.")
        name = newest[-1].parent.name
    run_dir = files.run_dir(where, name)
    run = Run.read(run_dir)
    if run is not None:
        return _run_files(run_dir, run, node, rank, attempt)
    if name not in up.names(where):
        raise UsageError(f"no run or cluster is named {name}", "See `raylaunch status --all`.")
    if rank is not None or attempt is not None:
        option = "--attempt" if rank is None else "--rank"
        raise UsageError(f"{option} belongs to a run, and this is a cluster", "Give --node, or a run's name.")
    found = sorted((files.cluster_dir(where, name) / records.LOGS).glob("*"))
    return [path for path in found if node is None or path.stem in {node, f"{node}-ray"}]


def _run_files(run_dir: Path, run: Run, node: str | None, rank: int | None, attempt: int | None) -> list[Path]:
    """An attempt's ranks, by default the last one's, and the driver unless one place or attempt is asked for."""
    folder = files.attempt_dir(run_dir, run.attempt if attempt is None else attempt)
    if attempt is not None and not folder.is_dir():
        there = ", ".join(str(int(path.name)) for path in sorted(folder.parent.glob("[0-9][0-9][0-9][0-9]")))
        raise UsageError(f"run {run.name} has no attempt {attempt}", f"Available: {there or 'none yet'}.")
    ranks = sorted(folder.glob("rank-*.log"), key=lambda p: int(p.stem.removeprefix("rank-")))
    if rank is not None:
        return [path for path in ranks if path.stem == f"rank-{rank}"]
    if node is not None:
        return [path for path in ranks if re.search(rf"\bnode={re.escape(node)}\b", _first_line(path))]
    return ranks if attempt is not None else [run_dir / records.LOGS / "driver.log", *ranks]


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as source:
        return source.readline()


def _print(logs: list[Path], lines: int, follow: bool) -> None:
    offsets = dict.fromkeys(logs, 0)
    first = True
    while True:
        for path in logs:
            try:
                with path.open("rb") as source:
                    source.seek(offsets[path])
                    text = source.read()
            except FileNotFoundError:
                continue
            whole = text if not follow else text[: text.rfind(b"\n") + 1]
            offsets[path] += len(whole)
            rows = whole.decode(errors="replace").splitlines()
            prefix = f"{path.stem}: " if len(logs) > 1 else ""
            for row in rows[-lines:] if first else rows:
                click.echo(prefix + row)
        first = False
        if not follow:
            return
        time.sleep(0.3)
