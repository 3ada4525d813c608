"""Nodes die, freeze, are cut off, come back, are drained and added. Each run ends on the undisturbed curve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from drill import Drill

from raylaunch.tools.sandbox import daemons
from raylaunch.tools.sandbox.procs import Proc

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(600)]


@contextmanager
def open_drill() -> Iterator[Drill]:
    """Five nodes, three of them in the cluster at first: there are two to replace with."""
    with Drill.on("nodes", nodes=5) as made:
        up(made)
        yield made
        made.clean()


def up(drill: Drill) -> None:
    drill.up(3, elastic__max_nodes=4, elastic__max_strikes=50)


@pytest.fixture(autouse=True)
def whole(drill: Drill) -> Iterator[None]:
    """Each test begins with three ready nodes in whole jobs, and mends what it broke."""
    drill.boot_all()
    if not drill.jobs_are_whole():
        drill.clean()
        up(drill)
    drill.wait("three ready nodes", lambda: drill.ready() == 3)
    yield
    for node in drill.site.sandbox.status().nodes:
        if node.frozen:
            drill.site.sandbox.thaw(node.name)
        if node.cut:
            drill.site.sandbox.heal(node.name)


def test_a_node_dies_and_is_replaced(drill: Drill) -> None:
    command = drill.train("replaced", elastic={"max_nodes": 3})
    attempt = drill.at_gate("replaced")
    victim = drill.other_than_head()
    before = len(drill.cluster_events("joiner_submitted"))
    drill.site.sandbox.kill(victim)
    drill.wait_event("replaced", "fault", cause="node_lost", node=victim)
    started = drill.wait_event("replaced", "attempt_started", count=2)
    assert started["workers"] == 2  # at once, without waiting for the joiner
    attempt = drill.at_gate("replaced", after=attempt)
    drill.wait_cluster_event("joiner_submitted", count=before + 1)
    drill.wait("three ready nodes", lambda: drill.ready() == 3)
    drill.wait_event("replaced", "resize_requested", attempt=attempt, why="grow")
    drill.open_gate("replaced")
    drill.finished(command, "replaced")
    drill.recovered("replaced", 3)
    grown = next(row for row in drill.run_events("replaced", "attempt_ended") if row["how"] == "resized")
    assert grown["step"] == grown["committed"]
    joined = [row for row in drill.site.members(drill.cluster).values() if row["joiner"] and row["state"] == "ready"]
    shown = drill.site.cluster_status(drill.cluster)
    assert joined and {row["job"] for row in joined} <= {job["id"] for job in shown["jobs"]}


def test_the_head_s_node_dies(drill: Drill) -> None:
    """The batch host, too: those who live elect a new head in the same allocation."""
    incarnation, head = drill.incarnation(), drill.head()
    command = drill.train("beheaded")
    drill.at_gate("beheaded")
    base = drill.site.jobs()[0]
    drill.site.sandbox.kill(head)
    drill.wait("another head", lambda: drill.incarnation() == incarnation + 1)
    assert drill.head() != head
    drill.open_gate("beheaded")
    drill.finished(command, "beheaded")
    assert base in drill.site.jobs()  # no requeue: the same job
    (election,) = [row for row in drill.cluster_events("election") if row["incarnation"] == incarnation + 1]
    assert election["why"]


def test_two_nodes_at_once(drill: Drill) -> None:
    command = drill.train("twice")
    attempt = drill.at_gate("twice")
    victims = [node for node in drill.ready_nodes() if node != drill.head()][:2]
    for victim in victims:
        drill.site.sandbox.kill(victim)
    drill.at_gate("twice", after=attempt)
    drill.open_gate("twice")
    drill.finished(command, "twice")
    assert drill.sizes("twice")[0] == 3 and min(drill.sizes("twice")) < 3


def test_a_second_node_dies_during_the_recovery_from_the_first(drill: Drill) -> None:
    command = drill.train("again")
    drill.at_gate("again")
    first, second = [node for node in drill.ready_nodes() if node != drill.head()][:2]
    drill.site.sandbox.kill(first)
    drill.wait_event("again", "attempt_started", count=2)
    drill.site.sandbox.kill(second)
    drill.open_gate("again")
    drill.finished(command, "again")


def test_below_the_minimum_the_run_holds(drill: Drill) -> None:
    command = drill.train("held", elastic={"min_nodes": 3, "scale_up_delay": 1.0})
    drill.at_gate("held")
    drill.site.sandbox.kill(drill.other_than_head())
    hold = drill.wait_event("held", "decision", decision="hold")
    drill.open_gate("held")
    assert "min_nodes" in hold["setting"]
    drill.finished(command, "held")
    assert set(drill.sizes("held")) == {3}


@pytest.mark.parametrize("how", ["freeze", "cut"])
def test_a_node_falls_silent_and_comes_back(drill: Drill, how: str) -> None:
    command = drill.train(how)
    drill.at_gate(how)
    victim = drill.other_than_head()
    sandbox = drill.site.sandbox
    with drill.stale_writer(how, victim), drill.patient_slurm():
        (sandbox.freeze if how == "freeze" else sandbox.cut)(victim)
        fault = drill.wait_event(how, "fault", node=victim)
        assert fault["cause"] == "node_lost"
        drill.wait_event(how, "attempt_started", count=2)
        (sandbox.thaw if how == "freeze" else sandbox.heal)(victim)
    drill.open_gate(how)
    drill.finished(command, how)


@pytest.mark.parametrize("how", ["freeze", "cut"])
def test_the_head_falls_silent_and_comes_back(drill: Drill, how: str) -> None:
    """The others elect; the old head finds that, ends itself as head and comes back as a member."""
    run = f"{how}-head"
    incarnation, head = drill.incarnation(), drill.head()
    pid = str(drill.site.members(drill.cluster)[head]["pid"])
    sandbox = drill.site.sandbox
    command = drill.train(run)
    drill.at_gate(run)
    with drill.stale_writer(run, head), drill.patient_slurm():
        (sandbox.freeze if how == "freeze" else sandbox.cut)(head)
        drill.wait_another_head(incarnation, but=head)
        drill.wait_event(run, "attempt_started", count=2)
        (sandbox.thaw if how == "freeze" else sandbox.heal)(head)
        drill.wait_cluster_event("fenced", node=head, incarnation=incarnation)
        drill.wait("the old head's end", lambda: not drill.runs(head, pid))
    drill.open_gate(run)
    drill.finished(command, run)


def test_a_drained_node_is_left_with_no_step_lost(drill: Drill) -> None:
    command = drill.train("drained", step_scheduler={"ckpt_every_steps": 20})
    drill.at_gate("drained", commit=0)
    victim = drill.other_than_head()
    drill.site.slurm("scontrol", "update", f"nodename={victim}", "state=drain", "reason=test")
    try:
        drill.wait_event("drained", "resize_requested", why="drain")
        drill.open_gate("drained")
        drill.finished(command, "drained")
        resized = next(row for row in drill.run_events("drained", "attempt_ended") if row["how"] == "resized")
        assert resized["step"] == resized["committed"]
        drill.wait("the node's end", lambda: drill.nodes()[victim] == "ended")
    finally:
        drill.site.slurm("scontrol", "update", f"nodename={victim}", "state=resume")


def test_ray_drains_a_node(drill: Drill) -> None:
    """As an autoscaler or a person with Ray's own tools would: left at the next step, and it comes back anew."""
    command = drill.train("ray-drained", step_scheduler={"ckpt_every_steps": 20})
    drill.at_gate("ray-drained", commit=0)
    victim = drill.other_than_head()
    drill.ray_drain(victim)
    asked = drill.wait_event("ray-drained", "resize_requested", why="drain")
    drill.open_gate("ray-drained")
    drill.finished(command, "ray-drained")
    resized = next(row for row in drill.run_events("ray-drained", "attempt_ended") if row["how"] == "resized")
    assert resized["step"] == resized["committed"] and resized["time"] >= asked["time"]


def test_the_head_s_node_is_drained(drill: Drill) -> None:
    """It resigns first: the cluster does not end with it, and its successor lets the node go."""
    incarnation, victim = drill.incarnation(), drill.head()
    command = drill.train("drained-head")
    drill.at_gate("drained-head")
    drill.site.slurm("scontrol", "update", f"nodename={victim}", "state=drain", "reason=test")
    try:
        drill.wait_another_head(incarnation, but=victim)
        drill.open_gate("drained-head")
        drill.finished(command, "drained-head")
        drill.wait("the node's end", lambda: drill.nodes()[victim] == "ended")
    finally:
        drill.site.slurm("scontrol", "update", f"nodename={victim}", "state=resume")


def test_a_scaled_cluster_grows_and_shrinks(drill: Drill) -> None:
    """At a commit, with no step lost."""
    command = drill.train("scaled", elastic={"max_nodes": 4})
    drill.at_gate("scaled")
    drill.site.run("scale", drill.cluster, 4).expect(0)
    drill.wait("four ready nodes", lambda: drill.ready() == 4)
    drill.wait_event("scaled", "resize_requested", why="grow")
    drill.open_gate("scaled")
    drill.finished(command, "scaled")
    assert (drill.sizes("scaled")[0], drill.sizes("scaled")[-1]) == (3, 4)
    for row in drill.run_events("scaled", "attempt_ended"):
        assert row["how"] in {"resized", "finished"} and row["step"] == row["committed"], row
    drill.site.run("scale", drill.cluster, 3).expect(0)
    drill.wait("three ready nodes", lambda: drill.ready() == 3)


def test_slurm_s_own_daemons_die(drill: Drill) -> None:
    """Training does not notice a dead slurmctld or slurmd; the node loop waits, and goes on when Slurm is back."""
    sandbox, silence = drill.site.sandbox, "Slurm does not answer"
    before = len([row for row in drill.cluster_events("node_decision") if row["reason"] == silence])
    command = drill.train("daemons")
    drill.at_gate("daemons")
    controller = Proc.load(daemons.record(sandbox.layout, "slurmctld"))
    assert controller is not None
    controller.kill()
    victim = drill.other_than_head()
    sandbox.exec(victim, ["pkill", "-9", "-x", "slurmd"], check=True)
    try:
        drill.wait_cluster_event("node_decision", count=before + 1, reason=silence)
        drill.open_gate("daemons")
        drill.finished(command, "daemons", 0.0)
        assert drill.sizes("daemons") == [3]
    finally:
        daemons.start_slurmctld(sandbox.layout)
    daemons.wait_slurmctld(sandbox.layout, sandbox.spec)
    sandbox.kill(victim)  # its slurmd comes back with it
    drill.wait("a replacement", lambda: drill.ready() == 3 and victim not in drill.ready_nodes())
