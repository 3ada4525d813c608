"""One long training, struck by one fault after the other: each time it waits at its gate, one step after a commit.

Each fault names what must follow it. In the end the losses are those of the undisturbed run, no committed step was
done twice, and nothing is left. (Each fault alone, and its variants: test_processes, test_nodes.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import gate
import pytest
from drill import Drill
from helpers import wait_for
from undisturbed import EVERY, STEPS

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]

RUN = "gauntlet"


@contextmanager
def open_drill() -> Iterator[Drill]:
    """Five nodes, three of them in the cluster: there are two to replace with."""
    with Drill.on("gauntlet", nodes=5) as made:
        made.up(3, elastic__max_strikes=50)
        yield made
        made.clean()


@dataclass
class Gauntlet:
    """The run, and how far it got. The faults are its methods; each returns when the fault has been answered."""

    drill: Drill
    steps: int = gate.FIRST
    attempt: int = 0

    def strike(self, fault: Callable[[Gauntlet], None]) -> None:
        """One fault, on a whole cluster whose run waits at its gate."""
        self.make_whole()
        self.attempt = self.drill.at_gate(RUN, self.steps)
        fault(self)
        self.steps += EVERY
        self.drill.open_gate(RUN, self.steps)

    def grow(self) -> None:
        """The run takes the node that replaced the last one, at a commit."""
        self.attempt = self.drill.at_gate(RUN, self.steps)
        if self.drill.sizes(RUN)[-1] < 3:
            self.drill.wait_event(RUN, "resize_requested", attempt=self.attempt, why="grow")
            self.steps += EVERY
            assert self.steps < STEPS
            self.drill.open_gate(RUN, self.steps)
            self.wait_next_attempt(how="resized")
            assert self.drill.sizes(RUN)[-1] == 3

    def victim(self) -> str:
        """A node that the run is on, other than the head's."""
        on = self.drill.run_events(RUN, "attempt_started")[-1]["on"]
        return next(node for node in on if node != self.drill.head())

    def make_whole(self) -> None:
        """Three ready nodes, and two more that Slurm can give."""
        self.drill.boot_all()
        self.drill.wait("three ready nodes", lambda: self.drill.ready() == 3)

    def wait_next_attempt(self, **fields: object) -> None:
        """Until the present attempt has ended, with these words, and another one has begun."""
        self.drill.wait_event(RUN, "attempt_ended", attempt=self.attempt, **fields)
        attempts = len(self.drill.run_events(RUN, "attempt_ended"))
        self.drill.wait_event(RUN, "attempt_started", count=attempts + 1)

    def wait_next_head(self, incarnation: int, head: str) -> None:
        self.drill.wait_another_head(incarnation, but=head)

    # -- processes ----------------------------------------------------------------------------------

    def a_worker_is_killed(self) -> None:
        node, pid = self.drill.worker(RUN, 1, self.attempt)
        self.drill.site.inside(node, "kill", "-9", pid)
        self.wait_next_attempt(how="fault")
        ended = self.drill.wait_event(RUN, "attempt_ended", attempt=self.attempt)
        # On a busy machine a survivor's broken connection is told before the death behind it.
        assert ended["cause"] in {"worker_lost", "communication"}

    def the_raylet_is_killed(self) -> None:
        """The agent starts it again, on other ports: the GCS has given up on the old ones."""
        node = self.victim()
        ports = self.drill.site.members(self.drill.cluster)[node]["ports"]
        self.drill.site.inside(node, "pkill", "-9", "-x", "raylet")
        self.drill.wait_cluster_event("node_restarting", node=node)
        self.wait_next_attempt(how="fault")
        self.drill.wait_nodes(**{node: "ready"})
        assert self.drill.site.members(self.drill.cluster)[node]["ports"] != ports

    def an_agent_is_killed(self) -> None:
        """The node counts as lost at once, and comes back by its keeper."""
        node = self.victim()
        self.drill.site.inside(node, "kill", "-9", str(self.drill.site.members(self.drill.cluster)[node]["pid"]))
        self.drill.wait_cluster_event("node_lost", node=node)
        self.wait_next_attempt(how="fault", cause="node_lost", node=node)

    def the_driver_is_killed(self) -> None:
        self.drill.site.inside(self.drill.head(), "pkill", "-9", "-f", "raylaunch.training.driver")
        self.drill.wait_cluster_event("driver_lost", run=RUN)
        self.wait_next_attempt(cause="driver_lost")

    def the_dashboard_is_killed(self) -> None:
        """The run does not notice, and there is a dashboard again."""
        head, incarnation, before = self.drill.head(), self.drill.incarnation(), self.dashboard()
        self.drill.site.inside(head, "pkill", "-9", "-f", "dashboard/dashboard.py")
        wait_for("another dashboard", lambda: self.dashboard() not in {"", before}, 120)
        assert self.drill.incarnation() == incarnation
        assert self.attempt == len(self.drill.run_events(RUN, "attempt_started"))

    def dashboard(self) -> str:
        """The pid of the head's, once it is there."""

        def pid() -> str:
            look = ["pgrep", "-f", "dashboard/dashboard.py"]
            found = self.drill.site.sandbox.exec(self.drill.head(), look, capture_output=True, text=True, timeout=30)
            return str(found.stdout).strip()

        wait_for("a dashboard", pid, 120)
        return pid()

    def the_gcs_is_killed(self) -> None:
        """Ray's heart: the head resigns, another node is elected, the old one comes back as a member."""
        incarnation, head = self.drill.incarnation(), self.drill.head()
        self.drill.site.inside(head, "pkill", "-9", "-x", "gcs_server")
        self.wait_next_head(incarnation, head)
        self.wait_next_attempt(cause="head_lost")
        self.drill.wait_nodes(**{head: "ready"})

    # -- nodes --------------------------------------------------------------------------------------

    def a_node_dies(self) -> None:
        """The run goes on at once without it; a joiner job replaces it."""
        victim, joiners = self.victim(), len(self.drill.cluster_events("joiner_submitted"))
        self.drill.site.sandbox.kill(victim)
        self.wait_next_attempt(how="fault", cause="node_lost", node=victim)
        assert self.drill.sizes(RUN)[-1] == 2
        self.drill.wait_cluster_event("joiner_submitted", count=joiners + 1)
        self.drill.wait("three ready nodes", lambda: self.drill.ready() == 3)
        members = self.drill.site.members(self.drill.cluster).values()
        assert any(row["joiner"] and row["state"] == "ready" for row in members)

    def two_nodes_die(self) -> None:
        """Fewer are left than `elastic.min_nodes`: the run holds until there is a replacement."""
        holds = len(self.drill.run_events(RUN, "decision"))
        for victim in [node for node in self.drill.ready_nodes() if node != self.drill.head()]:
            self.drill.site.sandbox.kill(victim)
        self.drill.wait("a hold", lambda: any(self.held(row) for row in self.drill.run_events(RUN, "decision")[holds:]))
        self.wait_next_attempt(how="fault", cause="node_lost")
        assert self.drill.sizes(RUN)[-1] >= 2

    @staticmethod
    def held(row: Mapping[str, object]) -> bool:
        return row["decision"] == "hold" and "min_nodes" in str(row["setting"])

    def the_head_s_node_dies(self) -> None:
        """It is the batch host, too: those who live elect a new head in the same allocation."""
        incarnation, head = self.drill.incarnation(), self.drill.head()
        self.drill.site.sandbox.kill(head)
        self.wait_next_head(incarnation, head)
        # head.json comes first, its event a moment later.
        assert self.drill.wait_cluster_event("election", incarnation=self.drill.incarnation())["why"]
        self.wait_next_attempt(cause="head_lost")

    def the_head_is_frozen(self) -> None:
        """The others elect; when it wakes it finds that, ends as head and comes back. What it writes is fenced."""
        incarnation, head = self.drill.incarnation(), self.drill.head()
        pid = str(self.drill.site.members(self.drill.cluster)[head]["pid"])
        with self.drill.stale_writer(RUN, head), self.drill.patient_slurm():
            self.drill.site.sandbox.freeze(head)
            self.wait_next_head(incarnation, head)
            self.wait_next_attempt(cause="head_lost")
            self.drill.site.sandbox.thaw(head)
            self.drill.wait("the old head's end", lambda: not self.drill.runs(head, pid))

    def a_node_is_cut_off(self) -> None:
        """Silence is a loss after three seconds; what the node still writes is fenced."""
        victim = self.victim()
        with self.drill.stale_writer(RUN, victim), self.drill.patient_slurm():
            self.drill.site.sandbox.cut(victim)
            self.wait_next_attempt(how="fault", cause="node_lost", node=victim)
            self.drill.site.sandbox.heal(victim)

    def a_node_is_drained(self) -> None:
        """It is left at the next step, with none lost, and its agent ends."""
        victim = self.victim()
        self.drill.site.slurm("scontrol", "update", f"nodename={victim}", "state=drain", "reason=test")
        self.drill.wait_event(RUN, "resize_requested", attempt=self.attempt, why="drain")
        self.wait_next_attempt(how="resized")
        ended = self.drill.wait_event(RUN, "attempt_ended", attempt=self.attempt)
        assert ended["step"] == ended["committed"]
        self.drill.wait("the node's end", lambda: self.drill.nodes()[victim] == "ended")
        self.drill.site.slurm("scontrol", "update", f"nodename={victim}", "state=resume")


FAULTS = (
    Gauntlet.a_worker_is_killed,
    Gauntlet.the_raylet_is_killed,
    Gauntlet.an_agent_is_killed,
    Gauntlet.the_driver_is_killed,
    Gauntlet.the_dashboard_is_killed,
    Gauntlet.the_gcs_is_killed,
    Gauntlet.the_head_is_frozen,
    Gauntlet.a_node_is_cut_off,
    Gauntlet.a_node_dies,
    Gauntlet.the_head_s_node_dies,
    Gauntlet.two_nodes_die,
    Gauntlet.a_node_is_drained,
)
"""In this order, Slurm has no reason to run the base job again (see `Drill.jobs_are_whole`): it is configured anew, for the
nodes that fall silent, before one dies; and of the base job's three nodes the last one, the head's by then, stays."""


def test_gauntlet(drill: Drill) -> None:
    command = drill.train(RUN, elastic={"min_nodes": 2, "scale_up_delay": 30})
    gauntlet = Gauntlet(drill)
    for fault in FAULTS:
        print(f"gauntlet: {fault.__name__} at step {gauntlet.steps}", flush=True)
        gauntlet.strike(fault)
    gauntlet.make_whole()
    gauntlet.grow()
    drill.open_gate(RUN)
    drill.finished(command, RUN)
    assert drill.sizes(RUN)[0] == drill.sizes(RUN)[-1] == 3
