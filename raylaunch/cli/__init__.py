"""The command line: parse, call, print. Each command's module is imported only when it is called, so
that `raylaunch --help` needs nothing but click."""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import Any

import click

from raylaunch import __version__
from raylaunch.errors import RaylaunchError, UsageError

# name → (module:attribute, what it does); the help page is made from this table alone.
COMMANDS = {
    "up": ("raylaunch.cli.up:up", "Bring a cluster of Ray nodes up."),
    "plan": ("raylaunch.cli.plan:plan", "Memory, time and checkpoints of a run, before it starts."),
    "train": ("raylaunch.cli.train:train", "Train on a cluster; the same run name resumes."),
    "submit": ("raylaunch.cli.train:submit", "One batch job: cluster up, train, give it back."),
    "attach": ("raylaunch.cli.train:attach", "Watch a run that goes on."),
    "stop": ("raylaunch.cli.train:stop", "Save a run and end it."),
    "status": ("raylaunch.cli.status:status", "Clusters, jobs, nodes and runs."),
    "logs": ("raylaunch.cli.logs:logs", "What the workers, the driver or the nodes print."),
    "why": ("raylaunch.cli.why:why", "Why a run, a job or the job of a log failed."),
    "alerts": ("raylaunch.cli.alerts:alerts", "Try who is told of a run, and see what was sent."),
    "report": ("raylaunch.cli.report:report", "One page about a run: what happened, what it cost."),
    "history": ("raylaunch.cli.history:history", "Runs and clusters that there were, their hours, and who asked."),
    "dashboard": ("raylaunch.cli.status:dashboard", "The Ray dashboard's address and tunnel."),
    "down": ("raylaunch.cli.down:down", "Save what runs and take a cluster down."),
    "scale": ("raylaunch.cli.scale:scale", "Give a living cluster more nodes, or fewer."),
    "watch": ("raylaunch.cli.watch:watch", "See a cluster and its run live."),
    "checkpoints": ("raylaunch.cli.checkpoints:checkpoints", "List, verify, tidy up and export a run's checkpoints."),
    "data": ("raylaunch.cli.data:data", "Prepare documents for training, and look at them."),
    "convert": ("raylaunch.cli.convert:convert", "The config that does what an sbatch script does."),
    "doctor": ("raylaunch.cli.doctor:doctor", "The state of the cluster and its nodes, and what to do about it."),
    "script": ("raylaunch.cli.up:script", "Print the batch script that `up` would submit."),
    "metrics": ("raylaunch.cli.metrics:metrics", "Clusters and runs in Prometheus and Grafana."),
    "chaos": ("raylaunch.cli.chaos:chaos", "Do faults to a run on purpose; what each cost."),
    "sandbox": ("raylaunch.cli.sandbox:sandbox", "A real Slurm cluster on this machine, to try things."),
}


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
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="raylaunch")
def cli() -> None:
    """Keep Ray nodes alive on Slurm, and PyTorch FSDP training alive on those nodes.

    \b
      raylaunch up --nodes 4 && raylaunch train cfg.yaml
    """


def main() -> None:
    """Entry point: errors of ours are a message and an exit code, never a traceback."""
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
