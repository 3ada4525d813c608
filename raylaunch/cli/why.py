"""`raylaunch why`: one verdict on a run, a job or a log."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from raylaunch import state
from raylaunch.cli import options
from raylaunch.cli.show import table_width
from raylaunch.errors import RaylaunchError, UsageError
from raylaunch.runs import Run
from raylaunch.slurm.client import Slurm
from raylaunch.why import reading, run
from raylaunch.why.reading import Line
from raylaunch.why.verdict import Verdict, judge


@click.command()
@click.argument("what", metavar="RUN|JOB|LOGFILE")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@options.state_dir_option
def why(what: str, as_json: bool, state_dir: Path | None) -> None:
    """Why the RUN's last failed attempt, a JOB of Slurm's or the job behind a LOGFILE ended: the first cause, what was
    only its cascade, how sure that is, and what to do. The log may be anybody's: raylaunch need not have been there.

    \b
      raylaunch why my-run
      raylaunch why slurm-4711.out
    """
    found = _verdict(what, options.state_dir(state_dir))
    if isinstance(found, str):
        click.echo(json.dumps({"kind": None, "cause": found}) if as_json else found)
    elif as_json:
        click.echo(json.dumps(asdict(found), indent=1))
    else:
        _print(found)


def _verdict(what: str, where: Path) -> Verdict | str:
    path = Path(what).expanduser()
    run_dir = state.run_dir(where, what)
    if "/" not in what and (own := Run.read(run_dir)) is not None:
        failed = run.last_failure(run_dir)
        return run.describe(own) if failed is None else run.explain(run_dir, failed)
    if path.is_dir():
        raise UsageError(f"{what} is a directory", "Give a log file, a run's name or a job's number.")
    if path.exists():
        return judge(reading.lines(path))
    if what.isdigit():
        return _of_job(what)
    raise UsageError(
        f"{what} is no run in {where}, no file and no job's number", "See `raylaunch status --all`, or give a log file."
    )


def _of_job(job: str) -> Verdict:
    """What Slurm remembers, and the job's own output where it lies here."""
    said: list[Line] = []
    slurm = Slurm()
    rows = slurm.finished([job]) if slurm.available() else None
    if rows and (row := rows.get(job)) is not None:
        ended = f"State={row.state} ExitCode={row.exit_code}:{row.signal}"
        said.append(Line("sacct", 1, ended, host=row.nodes[0] if len(row.nodes) == 1 else None))
    output = Path(f"slurm-{job}.out")
    lines = list(reading.lines(output)) if output.exists() else []
    if not said and not lines:
        raise RaylaunchError(
            f"nothing is known of job {job}: no accounting of it, and no {output} here",
            "Give the job's output as a file: `scontrol show job JOB` names it (StdOut) for some minutes after its end.",
        )
    return judge([*lines, *said])


def _print(found: Verdict) -> None:
    console = Console(width=table_width(), highlight=False)
    who = [f"rank {found.rank}"] if found.rank is not None else []
    who += [f"on {found.host}"] if found.host is not None else []
    title = Text().append(found.kind, style="bold red").append(f"  {found.cause}", style="bold")
    console.print(title)
    sure = "sure" if found.confidence >= 0.9 else "likely" if found.confidence >= 0.6 else "a guess"
    console.print(f"  {', '.join([*who, f'{sure} ({found.confidence:.0%})'])}", style="dim", markup=False)
    console.print()
    for one in found.evidence:
        console.print(f"  {one.file}:{one.line}", style="dim", markup=False, soft_wrap=True)
        console.print(_indented(one.text, 4))
    if found.cascade:
        console.print("  what only followed:", style="dim")
        for text in found.cascade:
            console.print(_indented(text, 4, "dim"))
    console.print()
    console.print(_indented(found.action, 2))


def _indented(text: str, by: int, style: str = "") -> Padding:
    return Padding(Text(text, style=style), (0, 0, 0, by), expand=False)
