"""`raylaunch sandbox …`: a real Slurm cluster on this machine, by hand. Parse, call, print."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Callable
from typing import Any

import click

from raylaunch.tools.sandbox import DEFAULT_NAME, Sandbox, Status, take_down

_name = click.option("--name", default=DEFAULT_NAME, show_default=True, help="Name of the sandbox.")


@click.group()
def sandbox() -> None:
    """Run a Slurm cluster on this machine, for experiments and tests. Its nodes are Linux namespaces.

    \b
      raylaunch sandbox up
      eval "$(raylaunch sandbox env)"
      srun -N4 hostname
      raylaunch sandbox down
    """


@sandbox.command()
@click.option("--nodes", default=4, show_default=True, help="Number of nodes (node1 … nodeN).")
@click.option("--cpus", default=4, show_default=True, help="CPUs per node, as configured in Slurm.")
@click.option("--gpus", default=0, show_default=True, help="Fake GPUs per node.")
@click.option("--accounting", is_flag=True, help="Start slurmdbd and MariaDB, for sacct.")
@_name
def up(nodes: int, cpus: int, gpus: int, accounting: bool, name: str) -> None:
    """Start the cluster, and return when it accepts jobs."""
    made = Sandbox.up(name, nodes=nodes, cpus=cpus, gpus=gpus, accounting=accounting)
    click.echo(f"sandbox {name} is up: {', '.join(made.nodes)} in {made.layout.dir}")
    click.echo(f'use it:  eval "$(raylaunch sandbox env{_name_option(name)})"')


@sandbox.command(short_help="Print the exports that select the sandbox.")
@_name
def env(name: str) -> None:
    """Print the shell exports that make Slurm's commands use the sandbox."""
    for variable, value in Sandbox.load(name).env().items():
        click.echo(f"export {variable}={shlex.quote(value)}")


@sandbox.command("exec", short_help="Run COMMAND on NODE.", context_settings={"ignore_unknown_options": True})
@_name
@click.argument("node")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(name: str, node: str, command: tuple[str, ...]) -> None:
    """Run COMMAND on NODE: `raylaunch sandbox exec NODE -- COMMAND`. The exit code is that of COMMAND."""
    made = Sandbox.load(name)
    line = made.command(node, command)
    os.environ.update(made.env())
    os.execvp(line[0], line)


@sandbox.command()
@click.option("--silent", is_flag=True, help="Like a power loss: cut the network first.")
@_name
@click.argument("node")
def kill(name: str, node: str, silent: bool) -> None:
    """Kill all processes of NODE."""
    Sandbox.load(name).kill(node, silent=silent)


@sandbox.command()
@click.option("--resume/--no-resume", default=True, help="Resume the node in Slurm if it is down after the reboot.")
@_name
@click.argument("node")
def start(name: str, node: str, resume: bool) -> None:
    """Boot a killed NODE."""
    Sandbox.load(name).start(node, resume=resume)


def _verb(name: str, doc: str, act: Callable[[Sandbox, str], None]) -> None:
    @sandbox.command(name, help=doc)
    @_name
    @click.argument("node")
    def run(name: str, node: str) -> None:
        act(Sandbox.load(name), node)


_verb("cut", "Cut NODE off the network, in both directions.", Sandbox.cut)
_verb("heal", "Undo `cut`.", Sandbox.heal)
_verb("freeze", "Freeze all processes of NODE.", Sandbox.freeze)
_verb("thaw", "Undo `freeze`.", Sandbox.thaw)


@sandbox.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_name
def status(name: str, as_json: bool) -> None:
    """Show each node: running, frozen, cut off, and its state in Slurm."""
    found = Sandbox.load(name).status()
    click.echo(json.dumps(dataclasses.asdict(found), indent=2) if as_json else _table(found))


@sandbox.command()
@_name
def down(name: str) -> None:
    """Remove the sandbox, including one that did not start completely."""
    there = take_down(name)
    click.echo(f"sandbox {name} is down" if there else f"no sandbox {name}: nothing to do")


def _name_option(name: str) -> str:
    return "" if name == DEFAULT_NAME else f" --name {name}"


def _table(found: Status) -> str:
    parts = [f"{daemon} {'up' if alive else 'DEAD'}" for daemon, alive in found.daemons.items()]
    rows: list[tuple[Any, ...]] = [("NODE", "ADDRESS", "PID", "MACHINE", "SLURM")]
    for node in found.nodes:
        flags = [name for name, on in (("frozen", node.frozen), ("cut", node.cut)) if on]
        machine = "dead" if not node.running else "+".join(flags) or "up"
        slurm = f"{node.slurm}  ({node.reason})" if node.reason else node.slurm
        rows.append((node.name, node.address, node.pid or "-", machine, slurm))
    widths = [max(len(str(row[i])) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(str(cell).ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    ]
    header = f"{found.name}: {found.cpus} cpus, {found.gpus} gpus a node; {', '.join(parts)}"
    return "\n".join([header, found.directory, *lines])
