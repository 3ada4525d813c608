"""The only caller of Slurm's commands.

A question → one command through the injected runner, bounded in time, in an environment without the
variables that would change the answer → `parse` → rows. A refusal becomes a SlurmError with the
exact command, its stderr and the next step; a Slurm that does not answer becomes SlurmUnavailable.
It never retries, sleeps, or calls a command once a node or a job where one call for all will do.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from raylaunch.errors import SlurmError, SlurmUnavailable
from raylaunch.scheduler.slurm import parse, site
from raylaunch.scheduler.slurm.environment import clean_env
from raylaunch.scheduler.slurm.rows import FinishedRow, JobDetail, JobRow, NodeRow, PartitionRow, UsageRow
from raylaunch.scheduler.slurm.site import Association


class Completed(NamedTuple):
    """What a command left."""

    returncode: int
    stdout: str = ""
    stderr: str = ""


Runner = Callable[[Sequence[str], float, str | None, Mapping[str, str]], Completed]
"""(command, seconds, stdin or None, environment) → Completed. Raises subprocess.TimeoutExpired when
the time is up, OSError when there is no such command."""
TIMEOUT = 10.0
"""Seconds. Slurm's clients give up on a dead controller after 9 s by themselves, with a better message."""
_UNREACHABLE = (
    "Unable to contact slurm controller",
    "Socket timed out on send/recv operation",
    "Zero Bytes were transmitted or received",
    "Connection refused",
    "Connection timed out",
    "Could not establish a configuration source",
    "s_p_parse_file: cannot stat file",
    "Protocol authentication error",
    "Munge encode failed",
    "Incompatible versions of client and server code",
    "Slurm backup controller in standby mode",
)


_GONE = ("Invalid job id specified", "Job/step already completing or completed")
_NO_ACCOUNTING = (
    "accounting storage is disabled", "Slurm accounting storage is disabled", "supported accounting_storage plugin",
)  # fmt: skip


# sbatch's frequent refusals, in Slurm 22.05's words, and the next step.
_REFUSALS = (
    (
        "Invalid account or account/partition",
        "Set slurm.account to one of: `sacctmgr show assoc user=$USER`.",
    ),
    ("Invalid qos", "Set slurm.qos to one of: `sacctmgr show assoc user=$USER format=account,qos`."),
    ("time limit is invalid", "Lower slurm.time to what the partition allows: {partitions}"),
    (
        "Node count specification invalid",
        "Change slurm.nodes to what the partition has and allows: {partitions}",
    ),
    ("node configuration is not available", "No nodes have all that is asked for. Available: {partitions}"),
    ("generic resource (gres)", "Change slurm.gpus_per_node or slurm.gres. Available: {partitions}"),
    ("Memory specification can not", "Lower slurm.mem. Available: {partitions}"),
    ("More processors requested", "Lower slurm.cpus_per_task or ntasks_per_node. Available: {partitions}"),
    ("partition", "Set slurm.partition to one of: {names}."),
    ("Invalid feature", "Change slurm.constraint; `sinfo -o '%N %f'` lists the features."),
    ("Invalid node name", "Change slurm.nodelist or slurm.exclude; `sinfo -N` lists the nodes."),
    ("reservation is invalid", "Change slurm.reservation; `scontrol show reservation` lists them."),
    ("unrecognized option", "Take that option out of slurm.extra; see sbatch(1)."),
    ("Invalid --time", "Change slurm.time to minutes, hours:minutes:seconds or days-hours."),
    ("Job violates accounting/QOS policy", "The job exceeds a limit of your account or QOS: ask for less."),
    ("Access/permission denied", "That job or partition is not yours to use."),
)


def run(command: Sequence[str], timeout: float, stdin: str | None, env: Mapping[str, str]) -> Completed:
    """The real runner."""
    done = subprocess.run(
        list(command),
        # Not ours to pass on: a command must not eat what a user types.
        **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}),
        capture_output=True,
        timeout=timeout,
        env=dict(env),
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    return Completed(done.returncode, done.stdout, done.stderr)


def summary(rows: Sequence[PartitionRow], most: int = 8) -> str:
    """Partitions for a message: `main (default): 4 nodes with 4 CPUs, 24105 MiB, gpu:2, up to 1 day; …`."""
    names = list(dict.fromkeys(row.name for row in rows))
    texts = []
    for name in names[:most]:
        own = [row for row in rows if row.name == name]
        count, first = sum(row.node_count for row in own), own[0]
        has = [f"{count} node{'s' * (count != 1)} with {max(row.cpus for row in own)} CPUs"]
        has += [f"{max(row.memory for row in own)} MiB", *sorted({row.gres for row in own if row.gres})]
        if first.time_limit is not None:
            has.append(f"up to {timedelta(seconds=first.time_limit)}".removesuffix(", 0:00:00"))
        has += [] if first.up else ["down"]
        texts.append(f"{name}{' (default)' * first.default}: {', '.join(has)}")
    texts += [f"and {len(names) - most} more in `sinfo`"] if len(names) > most else []
    return "; ".join(texts)


class Slurm:
    """Slurm as raylaunch uses it. Tests give a fake `runner`."""

    def __init__(self, runner: Runner = run, timeout: float = TIMEOUT) -> None:
        self._runner = runner
        self._timeout = timeout

    def available(self) -> bool:
        """Whether there is a Slurm here; as `missing`."""
        return not self.missing()

    def missing(self) -> str:
        """Why there is no Slurm here, "" where there is: sbatch is installed and has a configuration.

        Raises SlurmUnavailable where it has one that cannot be read: that is a broken Slurm, and
        going on without it would surprise.
        """
        try:
            done = self._call(["sbatch", "--version"])
        except SlurmUnavailable as error:
            if isinstance(error.__cause__, OSError):
                return "Slurm's commands are not installed"
            if "configuration source" in error.message:
                return "Slurm's commands are installed, but find no configuration (SLURM_CONF)"
            raise
        return "" if done.returncode == 0 else f"`sbatch --version` failed (exit {done.returncode})"

    def submit(self, script: str, options: Sequence[str] = (), env: Mapping[str, str] | None = None) -> str:
        """Submit a batch script, given on stdin; the job id. `env` in place of our own environment.

        Raises SlurmError with sbatch's own words when it refuses. When it does not answer in time
        the job may be queued all the same.
        """
        command = ["sbatch", "--parsable", *options]
        environment = clean_env(os.environ if env is None else env, script, options)
        try:
            done = self._call(command, script, environment)
        except SlurmUnavailable as error:
            if isinstance(error.__cause__, subprocess.TimeoutExpired):
                error.hint = f"The job may be queued all the same: look with `squeue --me`. {error.hint}"
            raise
        if done.returncode != 0:
            raise self._failure(command, done, self._refusal_hint(done.stderr))
        return parse.parse_submitted(done.stdout)

    def would_start(self, script: str) -> datetime | None:
        """When a job of that script would start, were it submitted now; None where Slurm does not say. As `check`."""
        return site.parse_estimate(self.check(script))[0]

    def check(self, script: str) -> str:
        """Have sbatch test a script without submitting it: when and where it would start, in its words. Raises SlurmError
        when it refuses."""
        command = ["sbatch", "--test-only"]
        done = self._call(command, script, clean_env(os.environ, script))
        if done.returncode != 0:
            raise self._failure(command, done, self._refusal_hint(done.stderr))
        return done.stderr + done.stdout

    def jobs(self, ids: Sequence[str]) -> dict[str, JobRow]:
        """Jobs by id, in one call. An id that Slurm does not know (any more) is missing; one that has
        ended stays for a while (MinJobAge), in a terminal state."""
        if not ids:
            return {}
        # -t all: without it a job that has ended is left out at once, like one that never was.
        command = ["squeue", "-h", "-t", "all", "-o", parse.JOB_FORMAT, "-j", ",".join(ids)]
        done = self._call(command)
        if done.returncode != 0:
            # Said of a single unknown id only; among several, unknown ones are just left out.
            if any(words in done.stderr for words in _GONE):
                return {}
            raise self._failure(command, done)
        return {row.id: row for row in parse.parse_jobs(done.stdout)}

    def named(self, names: Sequence[str]) -> dict[str, JobRow]:
        """This user's jobs of these names, by id, in one call; such that have just ended, too."""
        command = ["squeue", "-h", "-t", "all", "-o", parse.JOB_FORMAT, "--me"]
        if not any("," in name for name in names):
            command.append(f"--name={','.join(names)}")
        done = self._call(command)
        if done.returncode != 0:
            raise self._failure(command, done)
        return {row.id: row for row in parse.parse_jobs(done.stdout) if row.name in names}

    def nodes(self) -> dict[str, NodeRow]:
        """All nodes that this user sees, in one call."""
        return parse.parse_nodes(self._said("sinfo", "-h", "-N", "-o", parse.NODE_FORMAT))

    def detail(self, job: str) -> JobDetail | None:
        """What squeue does not say of a job; None where Slurm does not know it (any more: MinJobAge after its end)."""
        done = self._call(["scontrol", "show", "job", "--oneliner", job])
        return parse.parse_detail(done.stdout)

    def requeue(self, job: str) -> None:
        """End the job and queue it anew, under its id. It then waits, two minutes by default, for its old
        credentials to expire; see `start_now`."""
        self._control("requeue", job)

    def start_now(self, job: str) -> None:
        """Skip the wait of a requeued job, once it is pending: while it still ends, Slurm forgets this."""
        self._control("update", f"jobid={job}", "StartTime=now")

    def keep_off(self, job: str, nodes: Sequence[str]) -> None:
        """Change the nodes that a waiting job must not get."""
        self._control("update", f"jobid={job}", f"ExcNodeList={','.join(nodes)}")

    def _control(self, *words: str) -> None:
        command = ["scontrol", *words]
        done = self._call(command)
        if done.returncode != 0:
            raise self._failure(command, done, self._refusal_hint(done.stderr))

    def finished(self, ids: Sequence[str]) -> dict[str, FinishedRow] | None:
        """Jobs by id from the accounting, which squeue has forgotten; None where there is no accounting."""
        if not ids:
            return {}
        command = ["sacct", "-X", "-n", "-P", f"--delimiter={parse.SEPARATOR}", "-o", parse.FINISHED_FORMAT]
        command += ["-j", ",".join(ids)]
        done = self._call(command)
        if done.returncode != 0:
            if any(words in done.stderr for words in _NO_ACCOUNTING):
                return None
            raise self._failure(command, done)
        return {row.id: row for row in parse.parse_finished(done.stdout)}

    def usage(self, ids: Sequence[str], since: datetime) -> list[UsageRow] | None:
        """What these jobs and their steps used, in all their allocations (a requeued job has several), in one call;
        None where there is no accounting. `since`: before their first one; ids are used again some day."""
        if not ids:
            return []
        command = ["sacct", "-D", "-n", "-P", f"--delimiter={parse.SEPARATOR}", "-o", parse.USAGE_FORMAT]
        command += ["-S", f"{since:%Y-%m-%dT%H:%M:%S}", "-j", ",".join(ids)]
        done = self._call(command)
        if done.returncode != 0:
            if any(words in done.stderr for words in _NO_ACCOUNTING):
                return None
            raise self._failure(command, done)
        return parse.parse_usage(done.stdout)

    def cancel(self, ids: Sequence[str], signal: str | None = None) -> None:
        """End jobs, or send `signal` ("USR1") to their batch scripts. Jobs that have ended are no error."""
        if not ids:
            return
        command = ["scancel", *([f"--signal={signal}", "--batch"] if signal else []), *ids]
        done = self._call(command)
        complaints = [line for line in done.stderr.splitlines() if not any(words in line for words in _GONE)]
        if done.returncode != 0 and (complaints or not done.stderr.strip()):
            raise self._failure(command, done, self._refusal_hint(done.stderr))

    def partitions(self) -> list[PartitionRow]:
        """The partitions that this user sees; several rows for one whose nodes are in several states."""
        return parse.parse_partitions(self._said("sinfo", "-h", "-o", parse.PARTITION_FORMAT))

    def settings(self) -> dict[str, str]:
        """The site's configuration, by Slurm's names."""
        return site.parse_settings(self._said("scontrol", "show", "config"))

    def default_memory(self, partition: str | None) -> dict[str, int]:
        """MiB that a job gets which asks for none, under Slurm's name (DefMemPerCPU, DefMemPerNode): the partition's
        (None: the default one's), else the site's. {}: the whole node's."""
        said = self._said("scontrol", "show", "partition", "--oneliner")
        return site.parse_default_memory(said, partition, self.settings())

    def associations(self, user: str) -> list[Association] | None:
        """The accounts of a user; None where there is no accounting."""
        try:
            said = self._said(
                "sacctmgr", "-n", "-P", "show", "associations", f"user={user}", f"format={site.ASSOCIATION_FORMAT}"
            )
        except SlurmUnavailable:
            raise
        except SlurmError as error:
            if any(words in error.message for words in _NO_ACCOUNTING):
                return None
            raise
        return site.parse_associations(said)

    def shares(self) -> dict[str, float]:
        """Account → this user's fair-share factor; {} where priorities know none."""
        return site.parse_shares(self._said("sshare", "-U", "-n", "-P", "-o", site.SHARE_FORMAT))

    def has_containers(self) -> bool:
        """Whether srun takes --container-image: pyxis is installed."""
        return "--container-image" in self._said("srun", "--help")

    def _said(self, *command: str) -> str:
        """The output of a command that must not fail."""
        done = self._call(command)
        if done.returncode != 0:
            raise self._failure(command, done)
        return done.stdout

    def _call(
        self, command: Sequence[str], stdin: str | None = None, env: Mapping[str, str] | None = None
    ) -> Completed:
        """Run a command; SlurmUnavailable when it is missing, too slow, or cannot reach Slurm."""
        shown = _shown(command)
        try:
            done = self._runner(command, self._timeout, stdin, clean_env(os.environ) if env is None else env)
        except subprocess.TimeoutExpired as error:
            said = _text(error.stderr)
            raise SlurmUnavailable(
                f"`{shown}` did not answer within {self._timeout:g} s" + _indented(said),
                _unavailable_hint(said),
            ) from error
        except OSError as error:
            raise SlurmUnavailable(
                f"`{command[0]}` cannot be run: {error.strerror or error}",
                "Work on a machine with Slurm's commands (a login node), or set cluster.backend to local.",
            ) from error
        if done.returncode != 0 and any(words in done.stderr for words in _UNREACHABLE):
            raise SlurmUnavailable(
                f"`{shown}` cannot reach Slurm (exit {done.returncode})" + _indented(done.stderr),
                _unavailable_hint(done.stderr),
            )
        return done

    def _failure(self, command: Sequence[str], done: Completed, hint: str = "") -> SlurmError:
        said = done.stderr.strip() or done.stdout.strip() or "it said nothing"
        return SlurmError(f"`{_shown(command)}` failed (exit {done.returncode})" + _indented(said), hint)

    def _refusal_hint(self, stderr: str) -> str:
        hint = next((hint for words, hint in _REFUSALS if words in stderr), "See sbatch(1).")
        if not hint.endswith(("{partitions}", "{names}.")):
            return hint
        try:
            rows = self.partitions()
        except SlurmError:  # the refusal is what matters; the list is a courtesy
            return hint.format(partitions="see `sinfo`", names="see `sinfo`")
        names = dict.fromkeys(f"{row.name}{' (default)' * row.default}" for row in rows)
        return hint.format(partitions=summary(rows), names=", ".join(names))


def _unavailable_hint(stderr: str) -> str:
    if "unge" in stderr or "authentication" in stderr:
        return "Munge, which tells Slurm who you are, does not work on this machine: ask its administrators."
    if "cannot stat file" in stderr or "configuration source" in stderr:
        return "No Slurm configuration was found: check SLURM_CONF, or use `--backend local`."
    return "Slurm's controller is down or overloaded: see `scontrol ping`, and try again later."


def _shown(command: Sequence[str]) -> str:
    """A command as one would type it; the separator is no character for a terminal."""
    return shlex.join(command).replace(parse.SEPARATOR, "\\x1f")


def _indented(text: str) -> str:
    """stderr under a message, its repetitions left out."""
    lines = dict.fromkeys(line.rstrip() for line in text.split("\n") if line.strip())
    return "".join(f"\n    {line}" for line in lines)


def _text(said: str | bytes | None) -> str:
    return said.decode(errors="replace") if isinstance(said, bytes) else said or ""
