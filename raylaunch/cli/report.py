"""`raylaunch report`: one page about a run."""

from __future__ import annotations

import json
import os
import sys
import webbrowser
from pathlib import Path

import click

from raylaunch.cli import options
from raylaunch.cli.show import note
from raylaunch.errors import StateError, UsageError
from raylaunch.state import files, records

FILE = "report.html"


@click.command()
@click.argument("run")
@click.option("--open", "show", is_flag=True, help="Open the report in a browser.")
@click.option("--html", type=click.Path(path_type=Path), help="Output file. Default: report.html in the run directory.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@options.state_dir_option
def report(run: str, show: bool, html: Path | None, as_json: bool, markdown: bool, state_dir: Path | None) -> None:
    """Write a one-page report about RUN: loss, throughput and number of workers over time with all faults, where the time
    went, nodes, utilisation, cost, configuration and code. It is one HTML file that needs no network.

    \b
      raylaunch report my-run
      raylaunch report my-run --markdown
    """
    if as_json and markdown:
        raise UsageError("--json and --markdown cannot be combined", "Give one of them.")
    directory = _directory(options.state_dir(state_dir), run)
    from raylaunch.observe.report import as_json as data
    from raylaunch.observe.report import markdown as as_text
    from raylaunch.observe.report import page
    from raylaunch.observe.report.gather import gather

    facts = gather(directory)
    if as_json:
        click.echo(json.dumps(data.as_dict(facts), indent=1, default=str))
    if markdown:
        click.echo(as_text.markdown(facts))
    if html is None and not show and (as_json or markdown):
        return
    path = _write(
        html.expanduser().absolute() if html is not None else directory / FILE, page.render(facts), html is not None
    )
    click.echo(str(path), err=as_json or markdown)
    if show:
        _open(path)


def _directory(where: Path, run: str) -> Path:
    """A run's directory, also of one whose run.json cannot be read."""
    directory = files.run_dir(where, run)
    if (
        "/" not in run
        and run not in {"", ".", ".."}
        and any((directory / name).exists() for name in (records.RUN_FILE, files.EVENTS_FILE))
    ):
        return directory
    known = sorted(p.parent.name for p in (where / "runs").glob(f"*/{records.RUN_FILE}"))
    raise UsageError(
        f"no run {run} in {where}",
        f"Available: {', '.join(known[-20:])}." if known else "Start one with `raylaunch train`.",
    )


def _write(path: Path, page: str, chosen: bool) -> Path:
    """Atomically; for its owner alone in the run directory, as usual where somebody has chosen the place."""
    mode = 0o600
    if chosen:
        os.umask(mask := os.umask(0))
        mode = 0o666 & ~mask
        if path.is_dir():
            raise UsageError(f"--html {path}: is a directory", f"Name a file in it: {path / FILE}.")
    try:
        files.write_text(path, page, mode)
    except StateError as error:
        raise StateError(error.message, "Choose another file with --html FILE.") from error
    return path


def _open(path: Path) -> None:
    """In a graphical browser: one in the terminal would take it over."""
    graphical = sys.platform == "darwin" or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
    if not graphical or not webbrowser.open(path.as_uri()):
        note(f"no browser here; on your own machine: scp {os.uname().nodename}:{path} . && open {path.name}")
