"""`raylaunch doctor`: check the cluster, print findings and the next steps."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from raylaunch.cli import options
from raylaunch.cli.show import LiveLine
from raylaunch.cluster.up import state_dir_of
from raylaunch.config.schema import Config
from raylaunch.errors import SlurmUnavailable
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.tools.doctor import compare_nodes, login_check, run_checks
from raylaunch.tools.doctor.finding import GROUPS, Finding, Status, failed, few, problem, warning

_MARKS: dict[Status, tuple[str, str, str]] = {
    "ok": ("✓", "+", "green"), "warning": ("!", "!", "yellow"), "problem": ("✗", "x", "red"),
    "unknown": ("?", "?", "yellow"),
}  # fmt: skip
_WIDEST = 80


@click.command()
@click.argument("path", metavar="[CFG]", required=False, type=click.Path(path_type=Path))
@options.cluster_options
@options.sets_option
@options.state_dir_option
@click.option("--timeout", default=300.0, show_default=True, help="With --nodes: seconds to wait for the job to start.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list of findings.")
def doctor(
    path: Path | None, sets: tuple[str, ...], state_dir: Path | None, timeout: float, as_json: bool, **flags: Any
) -> int:  # fmt: skip
    """Check Slurm, the state directory and this machine. With --nodes, a short job also checks the nodes and reports
    slow ones. The exit code is 1 if there is a problem.

    \b
      raylaunch doctor
      raylaunch doctor --nodes 4 --gpus-per-node 8
    """
    config = options.load(path, sets, {**flags, "cluster__state_dir": state_dir and str(state_dir)})
    findings = _look(config, flags["slurm__nodes"] is not None, timeout)
    click.echo(json.dumps([asdict(one) for one in findings], indent=1) if as_json else report(findings, _width()))
    return int(failed(findings))


def _look(config: Config, on_nodes: bool, timeout: float) -> list[Finding]:
    slurm, backend = Slurm(), config.cluster.backend
    trouble: list[Finding] = []
    if backend != "local":
        try:
            if missing := slurm.missing():
                hint = "On a cluster, run this command on a login node. Here, `raylaunch up` starts local nodes."
                trouble = [(problem if backend == "slurm" else warning)("slurm.version", missing, hint)]
        except SlurmUnavailable as error:
            backend = "slurm"
            trouble = [problem("slurm.version", " ".join(error.message.split()), error.hint)]
    there = backend != "local" and not trouble
    kind = "slurm" if there else "local"
    with LiveLine() as show:
        show("checking this machine" + " and Slurm" * there)
        findings = trouble + login_check.run(config, state_dir_of(config), slurm if there else None)
        if on_nodes and not (trouble and backend == "slurm"):
            with options.interruptible():
                findings = compare_nodes.proved(
                    findings + run_checks.run(config, state_dir_of(config), kind, timeout, show)
                )
    order = list(GROUPS)
    return sorted(findings, key=lambda one: order.index(one.group))


def _width() -> int:
    return max(30, min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns))


def report(findings: Sequence[Finding], width: int) -> str:
    """Format findings for a terminal: grouped by heading, nodes with the same finding on one line, next steps below."""
    plain = not _can_print("✓✗")
    lines: list[str] = []
    counts = dict.fromkeys(_MARKS, 0)
    for group, members in groupby(findings, key=lambda one: one.group):
        lines += ["", click.style(GROUPS[group], bold=True)] if lines else [click.style(GROUPS[group], bold=True)]
        for same in _together(list(members)):
            mark, ascii_mark, colour = _MARKS[same[0].status]
            counts[same[0].status] += 1
            who = few([one.node for one in same if one.node], 6)
            text = f"{who}: {same[0].text}" if who else same[0].text
            text = "".join(c if c.isprintable() else " " for c in text)  # parts are output of other programs
            filled = textwrap.wrap(text, width - 4, break_on_hyphens=False) or [""]
            lines.append(f"  {click.style(ascii_mark if plain else mark, fg=colour)} {filled[0]}")
            lines += [f"    {line}" for line in filled[1:]]
            if same[0].hint and same[0].status != "ok":
                lines += textwrap.wrap(same[0].hint, width, initial_indent="    > ", subsequent_indent="      ",
                                       break_on_hyphens=False)  # fmt: skip
    said = [f"{counts[s]} {s}{'s' * (counts[s] != 1)}" for s in ("problem", "warning") if counts[s]]
    said += [f"{counts['unknown']} unknown"] if counts["unknown"] else []
    return "\n".join([*lines, "", ", ".join(said) or "No problems found."])


def _together(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Group findings that differ only in the node."""
    found: dict[tuple[str, ...], list[Finding]] = {}
    for one in findings:
        found.setdefault((one.check, one.status, one.text, one.hint), []).append(one)
    return list(found.values())


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeError:
        return False
    return True
