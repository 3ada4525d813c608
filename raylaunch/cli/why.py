"""`raylaunch why`: one verdict on a run, a job or a log."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from raylaunch.cli import options
from raylaunch.cli.show import table_width
from raylaunch.errors import UsageError
from raylaunch.observe import status
from raylaunch.observe.why import job_log, log_lines, run
from raylaunch.observe.why.verdict import Verdict, judge, on
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.state import files
from raylaunch.state.runs import Run


@click.command()
@click.argument("what", metavar="RUN|JOB|LOGFILE")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.state_dir_option
def why(what: str, as_json: bool, state_dir: Path | None) -> None:
    """Explain why the last failed attempt of a RUN, a Slurm JOB or the job behind a LOGFILE ended: the first cause, the
    errors that only followed from it, the confidence, and what to do. The log may be of any job, also one without raylaunch.

    \b
      raylaunch why my-run
      raylaunch why slurm-4711.out
    """
    found, survived = _verdict(what, options.state_dir(state_dir))
    if isinstance(found, str):
        click.echo(json.dumps({"kind": None, "cause": found}) if as_json else found)
    elif as_json:
        click.echo(json.dumps({**asdict(found), "survived": bool(survived)}, indent=1))
    else:
        if survived:
            click.echo(f"{survived}\n")
        _print(found)


def _verdict(what: str, where: Path) -> tuple[Verdict | str, str]:
    """The verdict, or what there is to say instead; and of a run that went on after that failure, how it is now."""
    path, run_dir = Path(what).expanduser(), files.run_dir(where, what)
    if "/" not in what and (own := Run.read(run_dir)) is not None:
        failed, now = run.last_failure(run_dir), run.describe(own, status.state_of(where, own))
        if failed is None:
            return f"{now}; no attempt has failed", ""
        return run.explain(run_dir, failed), "" if own.state == "failed" else f"{now}. Attempt {failed.attempt} failed:"
    if path.is_dir():
        raise UsageError(f"{what} is a directory", "Specify a log file, a run name or a job ID.")
    if path.exists():
        return _of_file(path), ""
    if what.isdigit():
        return job_log.explain(what, Slurm()), ""
    raise UsageError(
        f"{what} is not a run in {where}, a file, or a job ID", "See `raylaunch status --all`, or specify a log file."
    )


def _of_file(path: Path) -> Verdict:
    found = judge(log_lines.lines(path))
    if found.kind == "unknown" and not found.evidence:
        with path.open("rb") as source:
            start = source.read(4096)
        if not start.strip():
            return on(found, cause="the log is empty", action="Check the logs of the other ranks.")
        if b"\0" in start:
            return on(found, cause=f"{path} is not a text file", action="Specify the output file of the job.")
    return found


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
        console.print("  consequences:", style="dim")
        for text in found.cascade:
            console.print(_indented(text, 4, "dim"))
    console.print()
    console.print(_indented(found.action, 2))


def _indented(text: str, by: int, style: str = "") -> Padding:
    return Padding(Text(text, style=style), (0, 0, 0, by), expand=False)
