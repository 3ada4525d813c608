"""What the chaos tests share: a run on a real cluster, a fault in the middle of it, and what must hold after.

Each test is one run of the same small training. Its losses must be those of the run that nothing
happened to; no committed step is done twice; nothing is left behind.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gate
import hostlist
import stale
import undisturbed
import yaml
from helpers import BIN, Command, Site, changed, own_sandbox, same_curve, wait_for, write_texts
from undisturbed import EVERY, STEPS

from raylaunch.checkpoint import store
from raylaunch.state import files

SAME_SIZE, OTHER_SIZE = 0.0, 1e-4
"""Relative differences of the losses: none at the same size, floating-point order at another."""
LIMIT = float(os.environ.get("RAYLAUNCH_TEST_PATIENCE", "240"))
"""Seconds for a recovery; many times what it takes on a quiet machine."""


@dataclass
class Drill:
    """One cluster on one sandbox, for the runs of a module."""

    site: Site
    cluster: str = "main"

    @classmethod
    @contextmanager
    def on(cls, name: str, nodes: int, cpus: int = 4) -> Iterator[Drill]:
        """A sandbox of `nodes` nodes; the cluster on it is up to the test."""
        with own_sandbox(name, nodes=nodes, cpus=cpus) as machine:
            site = Site.make(machine, "alice")
            write_texts(site.state / "text")
            drill = cls(site)
            try:
                yield drill
            finally:
                drill.abandon()

    def abandon(self) -> None:
        """End whatever a failed test may have left running, frozen or cut."""
        for node in self.site.sandbox.status().nodes:
            if node.frozen:
                self.site.sandbox.thaw(node.name)
            if node.cut:
                self.site.sandbox.heal(node.name)
        self.site.end()

    def story(self) -> str:
        """The last that happened to the cluster and to its runs, for whoever reads of a failure."""
        runs = [path.parent for path in self.site.state.glob(f"runs/*/{files.EVENTS_FILE}")]
        rows = [row for directory in (self.site.cluster(self.cluster), *runs) for row in self.site.events(directory)]
        return "\n".join(str(row)[:300] for row in sorted(rows, key=lambda row: row["time"])[-60:])

    # -- starting -----------------------------------------------------------------------------------

    def up(self, nodes: int | str, options: Sequence[str] = (), **sets: Any) -> None:
        """Bring the cluster up; `options` of sbatch; `sets`: config keys with `__` for the dot."""
        words = [w for key, value in sets.items() for w in ("--set", f"{key.replace('__', '.')}={value}")]
        config = self.config("cluster")
        self.site.run(
            "up", "-c", config, "--name", self.cluster, "--nodes", nodes, "--mem", "3G", *words, "--", *options
        ).expect(0)

    def config(self, name: str, **changes: Any) -> Path:
        """A config file for the run, with these changes to its sections."""
        config: dict[str, Any] = {
            **undisturbed.config(self.site.state / "text"),
            "elastic": {"scale_up_delay": 1.0, "hang_timeout": 600},  # a run that waits at its gate does not hang
            "trainer": gate.TRAINER,
            "slurm": {"env": {"PYTHONPATH": str(Path(__file__).parent)}},  # for trainers that misbehave
        }  # fmt: skip
        path = self.site.state / "home" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(changed(config, changes)))
        return path

    def train(self, run: str, **changes: Any) -> Command:
        """Start a run, and watch it in the background. It waits at its gate (see `gate`)."""
        return self.site.start("train", self.config(run, **changes), "--run", run, "--cluster", self.cluster)

    # -- looking ------------------------------------------------------------------------------------

    def run_events(self, run: str, kind: str | None = None) -> list[dict[str, Any]]:
        return self.site.events(self.site.run_dir(run), kind)

    def cluster_events(self, kind: str | None = None) -> list[dict[str, Any]]:
        return self.site.events(self.site.cluster(self.cluster), kind)

    def nodes(self) -> dict[str, str]:
        """Node → state, by the head's table."""
        return {name: str(row["state"]) for name, row in self.site.members(self.cluster).items()}

    def head(self) -> str:
        return str(files.read_json(self.site.cluster(self.cluster) / "head.json")["node"])

    def incarnation(self) -> int:
        return int(files.read_json(self.site.cluster(self.cluster) / "head.json")["incarnation"])

    def wait_another_head(self, incarnation: int, but: str = "") -> None:
        """A head that was elected after this incarnation's, on another node than `but`."""
        self.wait("another head", lambda: self.incarnation() > incarnation and self.head() != but)

    def allocation(self) -> str:
        """Of the base job: its id, and how often it began again."""
        return str(files.read_json(self.site.cluster(self.cluster) / "head.json")["allocation"])

    def worker(self, run: str, rank: int, attempt: int = 1) -> tuple[str, str]:
        """(node, pid there) of a rank, from the first line of its log."""
        log = files.attempt_dir(self.site.run_dir(run), attempt) / f"rank-{rank}.log"
        wait_for(f"rank {rank} of {run}", lambda: log.exists() and "device=" in log.read_text(), LIMIT)
        words = dict(re.findall(r"(\w+)=(\S+)", log.read_text().splitlines()[0]))
        return words["node"], words["pid"]

    def runs(self, node: str, pid: str) -> bool:
        """Whether a node has this process."""
        return pid in self.site.inside(node, "ps", "-eo", "pid=").split()

    def ray_drain(self, node: str) -> None:
        """`ray drain-node`, as a person with Ray's own tools would."""
        directory = self.site.cluster(self.cluster)
        gcs = files.read_json(directory / "head.json")["gcs"]
        ids = f"import ray; ray.init({gcs!r}); print({{n['NodeName']: n['NodeID'] for n in ray.nodes() if n['Alive']}}[{node!r}])"
        id_ = self._on_head(str(BIN / "python"), "-c", ids).split()[-1]
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        self._on_head(str(BIN / "ray"), "drain-node", "--address", gcs, "--node-id", id_, *why)

    def _on_head(self, *argv: str) -> str:
        """Output of a command on the head's node that may talk to Ray."""
        token = str(self.site.cluster(self.cluster) / "token")
        done = self.site.sandbox.exec(
            self.head(), argv, cwd="/", capture_output=True, text=True, timeout=60,
            env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token},
        )  # fmt: skip
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return str(done.stdout)

    # -- waiting ------------------------------------------------------------------------------------

    def at_gate(self, run: str, steps: int = gate.FIRST, after: int = 0, commit: int | None = None) -> int:
        """Wait until the run waits at its gate with so many steps done, in an attempt later than `after`, and its last
        `commit` (default: the last multiple of EVERY) is written; the attempt's number."""
        directory, commit = self.site.run_dir(run), steps - steps % EVERY if commit is None else commit

        def there() -> bool:
            attempt, step = gate.waiting(directory)
            return attempt > after and step == steps and self.committed(run) == commit

        self.wait(f"{run} at step {steps} of an attempt after {after}", there)
        return gate.waiting(directory)[0]

    def open_gate(self, run: str, steps: int = gate.EVERYTHING) -> None:
        """Let the run go on: to its end, or until so many steps are done."""
        gate.allow(self.site.run_dir(run), steps)

    def committed(self, run: str) -> int:
        """The last step that was committed. (Of a writer that was killed at once, the attempt's end alone tells it.)"""
        commits = [row["step"] for row in self.run_events(run, "commit")]
        return max(commits + [row["committed"] or 0 for row in self.run_events(run, "attempt_ended")], default=0)

    def wait_event(self, run: str, kind: str, count: int = 1, **fields: Any) -> dict[str, Any]:
        """Until the run has `count` events of a kind with these fields; the last of them."""

        def found() -> list[dict[str, Any]]:
            rows = self.run_events(run, kind)
            return [row for row in rows if all(row.get(k) == v for k, v in fields.items())]

        self.wait(f"{kind} {fields} of {run}", lambda: len(found()) >= count)
        return found()[-1]

    def wait_cluster_event(self, kind: str, count: int = 1, **fields: Any) -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            rows = self.cluster_events(kind)
            return [row for row in rows if all(row.get(k) == v for k, v in fields.items())]

        self.wait(f"{kind} {fields} of the cluster", lambda: len(found()) >= count)
        return found()[-1]

    def wait_nodes(self, **wanted: str) -> None:
        """Until these nodes are in these states."""
        self.wait(f"nodes {wanted}", lambda: all(self.nodes().get(n) == s for n, s in wanted.items()))

    def wait(self, what: str, ready: Callable[[], bool], limit: float = LIMIT) -> None:
        wait_for(what, ready, limit)

    def boot(self, node: str) -> None:
        """Once Slurm has found it dead: of a batch host that is back sooner it ends the whole job."""
        self.wait(f"{node} is down for Slurm", lambda: "down" in self.site.slurm("sinfo", "-h", "-n", node, "-o", "%T"))
        self.site.sandbox.start(node)

    def boot_all(self) -> None:
        """Boot the nodes that are dead."""
        for node in self.site.sandbox.status().nodes:
            if not node.running:
                self.boot(node.name)

    @contextmanager
    def patient_slurm(self) -> Iterator[None]:
        """A Slurm that takes no silent node for dead, however slow this machine is; all must answer it at the end.

        Of a node that it holds for down it ends, when the node is back, all that the job had there: also what a test
        waits for. And if it is the batch host, the whole job.

        Only while the jobs are whole (see `jobs_are_whole`)."""
        file = self.site.sandbox.layout.slurm_conf
        usual = file.read_text()
        patient = usual.replace("SlurmdTimeout=10\n", "SlurmdTimeout=3600\n")
        assert patient != usual
        try:
            file.write_text(patient)
            self.site.slurm("scontrol", "reconfigure")
            yield
            self.site.slurm("scontrol", "reconfigure")  # asks each node; else it would ask in a third of the hour
            self.wait("Slurm hears all nodes", lambda: "*" not in self.site.slurm("sinfo", "-h", "-o", "%T"))
        finally:
            file.write_text(usual)
            self.site.slurm("scontrol", "reconfigure")

    def jobs_are_whole(self) -> bool:
        """Whether Slurm has no reason to end one of the cluster's jobs, or to run one again, in the middle of a test.

        A base job that has lost its last node waits, or begins already, to run again. A job that has lost the node of its
        batch script goes on, but not once slurmctld has read its configuration again (`patient_slurm`): then another node
        counts as the batch host, and when that one registers, any number of tests later, its script is missing."""
        fields = "jobid:20,restartcnt:20,batchhost:50,nodelist:100"
        queue = self.site.slurm("squeue", "-h", "-t", "pending,running", "-O", fields)
        rows = [line.split() for line in queue.splitlines()]
        hosts = all(len(row) == 4 and row[2] in hostlist.expand_hostlist(row[3]) for row in rows)
        return hosts and self.allocation() in {f"{row[0]}:{row[1]}" for row in rows}

    @contextmanager
    def stale_writer(self, run: str, node: str) -> Iterator[None]:
        """On this node, a process of the present attempt's that tries to commit when the attempt was replaced: it must
        not, and nothing of it may be left."""
        started = self.run_events(run, "attempt_started")[-1]
        who = started["run_incarnation"], started["attempt"]
        checkpoints = self.site.run_dir(run) / "checkpoints"
        command = [str(BIN / "python"), stale.__file__, store.pending(checkpoints, stale.STEP, *who), *who]
        with self.site.sandbox.popen(node, [*map(str, command)], cwd="/", stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout.readline().strip() == stale.READY
                yield
                assert process.communicate(timeout=LIMIT)[0].strip() == store.Fenced.__name__
            finally:
                process.kill()
        left = f"step-{stale.STEP:08d}*"
        self.wait(f"no {left}", lambda: not list(checkpoints.glob(left)))

    def thaw_too_late(self, host: str, job: str) -> bool:
        """Thaw a job's batch host that Slurm holds for down; whether the job goes on without it.

        Slurm kills what the job has there, which mostly tells the job's end. But if slurmd registers in that very
        moment, slurmctld aborts the steps as "on wrong node", no end is told, and the job loses its batch script alone.
        """
        self.wait("Slurm's verdict", lambda: host not in self.site.job_nodes(job))
        self.site.sandbox.thaw(host)
        steps = ["sh", "-c", rf"pgrep -f '[s]lurmstepd: \[{job}\.' || true"]  # of this job: the successor may be there
        self.wait(f"the end of all steps of job {job} on {host}", lambda: not self.site.inside(host, *steps))
        return f"{job} RUNNING" in self.site.jobs()

    def reboot(self, node: str) -> None:
        """Where Slurm killed all at once, the agent's temp directory goes with the node only."""
        self.site.sandbox.kill(node)
        self.site.sandbox.start(node)

    # -- what must hold -----------------------------------------------------------------------------

    def finished(self, command: Command, run: str, relative: float = OTHER_SIZE) -> None:
        """The run came to its end on the curve of the undisturbed one, and no committed step was done again."""
        command.ended(LIMIT + 60).expect(0, f"run {run} is finished at step {STEPS}")
        same_curve(self.site.losses(run), self.reference(run), relative)
        self.committed_once(run)

    def reference(self, run: str) -> Mapping[int, float]:
        """The losses of a run that has as many workers from its beginning to its end as this one began with."""
        return undisturbed.losses(self.sizes(run)[0])

    def committed_once(self, run: str) -> None:
        """Each attempt begins right after the last commit before it."""
        events = self.run_events(run)
        # A commit whose process was killed right after it is told by the attempt's end alone.
        commits = [(row["time"], row["step"]) for row in events if row["kind"] == "commit"]
        commits += [(row["time"], row["committed"] or 0) for row in events if row["kind"] == "attempt_ended"]
        rows = [row for row in files.read_lines(self.site.run_dir(run) / "metrics.jsonl") if "loss" in row]
        for row in events:
            if row["kind"] == "attempt_started":
                before = max([step for time, step in commits if time < row["time"]], default=0)
                assert row["from_step"] == before, (row, before)
                steps = [r["step"] for r in rows if r["attempt"] == row["attempt"]]
                assert not steps or steps[0] == before + 1, (row, steps[:3])

    def recovered(self, run: str, size: int) -> None:
        """The run began with, and in the end had, so many workers; in between it was struck."""
        sizes = self.sizes(run)
        assert len(sizes) > 1 and sizes[0] == sizes[-1] == size, sizes

    def sizes(self, run: str) -> list[int]:
        """The world sizes of the run's attempts."""
        return [int(row["workers"]) for row in self.run_events(run, "attempt_started")]

    def clean(self) -> None:
        """Take the cluster down: nothing is left of it, anywhere.

        But for the temp directory of an agent that Slurm itself killed, on a node that had been lost: the next agent
        there removes it (`hosts.TempDir`), and until then nobody holds it."""
        self.site.run("down", self.cluster).expect(0)
        lost = {str(row.get("node")) for row in self.cluster_events("node_lost")}

        def left() -> list[str]:
            return [line for line in self.site.left() if not self._abandoned(line, lost)]

        wait_for("nothing left", lambda: not left(), 60, lambda: self.site.with_logs(left()))

    def _abandoned(self, line: str, lost: set[str]) -> bool:
        node, _, path = line.partition(": ")
        found = re.match(r"/tmp/rl-[^/]+", path)
        if node not in lost or found is None:
            return False
        free = self.site.sandbox.exec(node, ["flock", "-n", f"{found[0]}/.held", "true"], cwd="/", capture_output=True)
        return free.returncode == 0

    def ready_nodes(self) -> list[str]:
        return sorted(node for node, now in self.nodes().items() if now == "ready")

    def ready(self) -> int:
        return len(self.ready_nodes())

    def other_than_head(self) -> str:
        """A ready node that is not the head's."""
        return next(node for node in self.ready_nodes() if node != self.head())
