"""`raylaunch down`."""

from __future__ import annotations

from pathlib import Path

import click

from raylaunch.cli import options
from raylaunch.cli.show import LiveLine, note
from raylaunch.cluster import down as teardown
from raylaunch.cluster import up
from raylaunch.errors import RaylaunchError, UsageError
from raylaunch.state import audit
from raylaunch.timing import SAVE_LIMIT


@click.command()
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Stop all clusters in the state directory.")
@click.option(
    "--save-limit", default=SAVE_LIMIT, show_default=True, help="Seconds to wait for the run to save a checkpoint."
)
@options.state_dir_option
def down(name: str | None, everything: bool, save_limit: float, state_dir: Path | None) -> None:
    """Save a checkpoint of the run, stop the cluster, and check that no job or process is left."""
    if name is not None and everything:
        raise UsageError("NAME and --all cannot be combined", "Give one of them.")
    where = options.state_dir(state_dir)
    unclean = []
    chosen = _chosen(where, name, everything)
    if not chosen:
        click.echo(f"no cluster in {where}: nothing to do")
    for each in chosen:
        directory, record = up.find(where, each)
        audit.add(where, "down", note, cluster=each)
        with LiveLine() as line:
            ended = teardown.down(directory, record, save_limit, lambda text, each=each: line(f"{each}: {text}"))  # type: ignore[misc]
        if not ended.was_alive:
            click.echo(f"cluster {each} is down already")
        elif ended.clean:
            click.echo(f"cluster {each} is down: no job, process or temporary directory remains")
        else:
            unclean.append(each)
        for line_ in ended.notes:
            click.echo(f"  {line_}", err=True)
    if unclean:
        raise RaylaunchError(f"processes or files remain of {', '.join(unclean)}", "See the lines above.")


def _chosen(where: Path, name: str | None, everything: bool) -> list[str]:
    """The clusters meant: the named one, all, or the only living one."""
    if name is not None:
        return [name]
    known = up.names(where)
    if everything or len(known) < 2:
        return known
    living = [n for n in known if up.alive_job(*up.find(where, n)) is not None]
    if len(living) > 1:
        raise UsageError(f"several clusters are running: {', '.join(living)}", "Name one, or use --all.")
    return living or ["main" if "main" in known else known[0]]
