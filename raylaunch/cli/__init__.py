"""The command line: parse, call, print. Each command's module is imported only when it is called, so
that `raylaunch --help` needs nothing but click."""

from __future__ import annotations

import difflib
import importlib
import io
import sys
from typing import Any

import click

from raylaunch import __version__
from raylaunch.errors import RaylaunchError, UsageError

# Group → name → (module:attribute, what it does); the help page and docs/cli.md are made from this table.
GROUPS = {
    "Run": {
        "up": ("raylaunch.cli.up:up", "Start a cluster of Ray nodes on Slurm."),
        "train": ("raylaunch.cli.train:train", "Train on a running cluster, or resume a run."),
        "submit": ("raylaunch.cli.train:submit", "Submit one batch job that starts a cluster and trains."),
        "attach": ("raylaunch.cli.train:attach", "Follow a running training run."),
        "stop": ("raylaunch.cli.train:stop", "Save a checkpoint and stop a run."),
        "scale": ("raylaunch.cli.scale:scale", "Change the number of nodes of a running cluster."),
        "down": ("raylaunch.cli.down:down", "Save a checkpoint and stop a cluster."),
    },
    "Observe": {
        "status": ("raylaunch.cli.status:status", "Show clusters, jobs, nodes and runs."),
        "watch": ("raylaunch.cli.watch:watch", "Show a cluster and its run live."),
        "logs": ("raylaunch.cli.logs:logs", "Print the logs of workers, driver or nodes."),
        "why": ("raylaunch.cli.why:why", "Explain why a run or a job failed."),
        "report": ("raylaunch.cli.report:report", "Write a one-page report about a run."),
        "history": ("raylaunch.cli.history:history", "Show past runs, node-hours, and the audit log."),
        "dashboard": ("raylaunch.cli.status:dashboard", "Print the address of the Ray dashboard."),
        "alerts": ("raylaunch.cli.alerts:alerts", "Send a test alert, or list the alerts of a run."),
        "metrics": ("raylaunch.cli.metrics:metrics", "Export metrics to Prometheus and Grafana."),
    },
    "Prepare": {
        "doctor": ("raylaunch.cli.doctor:doctor", "Check Slurm, the state directory and the nodes."),
        "plan": ("raylaunch.cli.plan:plan", "Estimate memory, run time and checkpoint size."),
        "convert": ("raylaunch.cli.convert:convert", "Convert an sbatch script to a configuration."),
        "data": ("raylaunch.cli.data:data", "Prepare training data, or inspect it."),
        "script": ("raylaunch.cli.up:script", "Print the batch script that `up` would submit."),
    },
    "Operate": {
        "checkpoints": ("raylaunch.cli.checkpoints:checkpoints", "List, verify, clean up and export checkpoints."),
        "chaos": ("raylaunch.cli.chaos:chaos", "Inject faults into a run and measure each recovery."),
        "sandbox": ("raylaunch.cli.sandbox:sandbox", "Run a local Slurm cluster for experiments."),
    },
}
COMMANDS = {name: row for group in GROUPS.values() for name, row in group.items()}


class Lazy(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if near := difflib.get_close_matches(args[0], COMMANDS, n=1):
                raise click.UsageError(f"{error.format_message()} Did you mean {near[0]}?", ctx) from error
            raise

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RaylaunchError as error:
            from raylaunch.state import audit

            audit.add_outcome(ctx.meta.get(audit.ASKED, []), "refused" if isinstance(error, UsageError) else "failed")
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, group in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, text) for name, (_, text) in group.items()])


@click.command(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="raylaunch")
def cli() -> None:
    """Train with PyTorch FSDP on Slurm, and keep training when nodes die.

    \b
      raylaunch up --nodes 4 && raylaunch train cfg.yaml
    """


def main() -> None:
    """Entry point: errors of ours are a message and an exit code, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names and paths may have bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    try:
        status = cli.main(standalone_mode=False)
    except RaylaunchError as error:
        _complain(error.message, error.hint)
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `raylaunch logs | head` is no failure
            sys.stdout = None
            sys.exit(0)
        if error.filename is None:
            raise
        _complain(
            f"{error.filename}: {error.strerror}", "Check that path; `--state-dir` chooses another state directory."
        )
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


def _complain(message: str, hint: str) -> None:
    click.echo(click.style("error: ", fg="red", bold=True) + message, err=True)
    for line in hint.splitlines():
        click.echo(f"  {line}", err=True)
