"""Nodes that come from elsewhere, and nodes that are not wanted back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import gate
import pytest
from drill import Drill

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def machine() -> Iterator[Drill]:
    with Drill.on("joining", nodes=3) as made:
        made.site.slurm("scontrol", "update", "partition=low", "GraceTime=20")
        yield made


@pytest.fixture
def alone(machine: Drill) -> Iterator[Drill]:
    """The machine for one cluster of a test's own; one that fails leaves nothing to the next."""
    yield machine
    machine.abandon()
    for node in machine.site.sandbox.status().nodes:
        if not node.running:
            machine.site.sandbox.start(node.name)


def test_a_node_that_struck_out_is_left_and_not_taken_again(alone: Drill) -> None:
    drill = Drill(alone.site, "strict")
    drill.up(2, elastic__max_strikes=2)
    reference = drill.smooth()
    command = drill.train("strict")
    drill.at_gate("strict")
    victim, killed = drill.other_than_head(), ""

    def agent() -> str:
        """The pid of an agent there that is ready and was not killed."""
        row = drill.site.members(drill.cluster)[victim]
        return str(row["pid"]) if row["state"] == "ready" and str(row["pid"]) != killed else ""

    for strike in (1, 2):
        drill.wait(f"{victim} is ready", lambda: bool(agent()), "strict")
        killed = agent()
        drill.site.inside(victim, "kill", "-9", killed)
        drill.wait_cluster_event("strike", node=victim, count=strike)
    drill.wait_cluster_event("excluded", node=victim)
    joiner = drill.wait_cluster_event("joiner_submitted")
    assert victim in joiner["exclude"]
    drill.open_gate("strict")
    drill.finished(command, "strict", reference)
    drill.wait("two ready nodes", lambda: drill.ready() == 2)
    assert victim not in drill.ready_nodes()
    drill.clean()


def test_where_nodes_may_not_submit_jobs_the_login_node_does(alone: Drill) -> None:
    """As a site forbids it: the nodes have an sbatch of their own, which refuses."""
    drill = Drill(alone.site, "watched")
    sbatch, refusing = str(shutil.which("sbatch")), drill.site.state / "sbatch"
    refusing.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && exec echo slurm\necho 'sbatch: error: from login nodes only' >&2\nexit 1\n"
    )
    refusing.chmod(0o755)
    nodes = [node.name for node in drill.site.sandbox.status().nodes]
    for node in nodes:
        drill.site.inside(node, "mount", "--bind", str(refusing), sbatch)
    drill.up(2)
    reference = drill.smooth()
    refused = drill.wait_cluster_event("joiner_refused")
    assert "from login nodes only" in refused["error"] and "raylaunch watch" in refused["hint"]
    command = drill.train("watched")
    drill.at_gate("watched")
    victim = drill.other_than_head()
    drill.site.sandbox.kill(victim)
    drill.wait_event("watched", "attempt_started", workers=1)
    watcher = drill.site.start("watch", "watched")
    assert drill.wait_cluster_event("joiner_submitted")["by"] == "watch"
    drill.wait("two ready nodes", lambda: drill.ready() == 2)
    drill.open_gate("watched")
    drill.finished(command, "watched", reference)
    drill.clean()
    watcher.ended().expect(0, "cluster watched has ended: down")
    drill.site.sandbox.start(victim)  # with a mount table of its own again
    for node in nodes:
        if node != victim:
            drill.site.inside(node, "umount", sbatch)


def test_the_head_is_away_for_longer_than_slurm_waits(alone: Drill) -> None:
    """Slurm ends the base job when its batch host comes back: the joiners go on. (Or it leaves the job: all go on.)"""
    drill = Drill(alone.site, "away")
    drill.up(2)
    reference, head = drill.smooth(), drill.head()
    command = drill.train("away", elastic={"max_nodes": 3})
    drill.at_gate("away")
    (base,) = [job.split()[0] for job in drill.site.jobs()]
    drill.site.sandbox.freeze(head)

    def joined() -> bool:
        return any(row["joiner"] and row["state"] == "ready" for row in drill.site.members(drill.cluster).values())

    drill.wait("a joiner", joined, "away")
    goes_on = drill.thaw_too_late(head, base)
    drill.open_gate("away")
    drill.finished(command, "away", reference)
    assert bool(drill.cluster_events("base_lost")) != goes_on and not drill.cluster_events("ending")
    drill.wait("two ready nodes", lambda: drill.ready() == 2)
    drill.reboot(head)
    drill.clean()


@pytest.fixture(scope="module")
def guests(machine: Drill) -> Iterator[Drill]:
    """A base of one node, and two preemptible ones that joined it."""
    machine.up(1, elastic__max_nodes=3, elastic__join__partition="low")
    machine.wait("two guests", lambda: machine.ready() == 3)
    yield machine
    machine.clean()


def test_idle_nodes_of_another_partition_are_taken_and_given_back(guests: Drill) -> None:
    """They go to another job with no step lost, and come again."""
    drill, reference = guests, guests.smooth()
    command = drill.train("guests", elastic={"max_nodes": 3})
    attempt = drill.at_gate("guests")
    other = drill.site.slurm("sbatch", "--parsable", "-N2", "--exclusive", "-p", "main", "--wrap", "sleep 300").strip()
    drill.wait_event("guests", "attempt_started", workers=1)
    drill.wait("the other job runs", lambda: f"{other} RUNNING" in drill.site.jobs())
    drill.wait("a run of one worker", lambda: gate.waiting(drill.site.run_dir("guests"))[0] > attempt)
    attempt = gate.waiting(drill.site.run_dir("guests"))[0]
    drill.site.slurm("scancel", other)
    drill.wait("three ready nodes", lambda: drill.ready() == 3, "guests")
    drill.wait_event("guests", "resize_asked", attempt=attempt, why="grow")
    drill.open_gate("guests")
    drill.finished(command, "guests", reference)
    sizes = drill.sizes("guests")
    assert sizes[0] == 3 and 1 in sizes and sizes[-1] == 3, sizes
    for row in drill.run_events("guests", "attempt_ended"):
        assert row["how"] in {"resized", "finished"} and row["step"] == row["committed"], row


def test_a_guest_that_leads_is_preempted(guests: Drill) -> None:
    """Its own job ends, not the cluster's: another node leads."""
    drill, reference, incarnation = guests, guests.smooth(), guests.incarnation()
    command = drill.train("led")
    attempt = drill.at_gate("led")
    drill.site.inside(drill.head(), "pkill", "-9", "-x", "gcs_server")  # the base's node leads no more
    drill.wait("a guest that leads", lambda: drill.incarnation() > incarnation, "led")
    leader = drill.head()
    assert drill.site.members(drill.cluster)[leader]["joiner"]
    attempt = drill.at_gate("led", after=attempt)
    other = ["sbatch", "--parsable", "-w", leader, "--exclusive", "-p", "main", "--wrap", "sleep 300"]
    job = drill.site.slurm(*other).strip()
    drill.wait("another head", lambda: drill.head() != leader, "led")
    drill.wait_event("led", "resize_asked", attempt=attempt, why="drain")  # saved and left first
    drill.open_gate("led")
    drill.site.slurm("scancel", job)
    drill.finished(command, "led", reference)
    assert not drill.cluster_events("ending")


def test_a_base_that_slurm_runs_again_beside_a_guest(guests: Drill) -> None:
    """The base's only node dies; Slurm queues the job anew and starts it on a guest's node: one agent of the two
    stays, and does not mind the other's end."""
    drill, reference, incarnation = guests, guests.smooth(), guests.incarnation()
    drill.wait("all three nodes", lambda: drill.ready() == 3)
    base = next(row["name"] for row in drill.site.members(drill.cluster).values() if not row["joiner"])
    life = drill.life()
    command = drill.train("again", elastic={"max_nodes": 4})
    drill.at_gate("again")
    drill.site.sandbox.kill(base)
    drill.wait("the base again", lambda: drill.life() != life, "again")
    drill.open_gate("again")
    drill.finished(command, "again", reference)
    assert drill.incarnation() > incarnation
    assert not [row for row in drill.cluster_events("strike") if "could not start" in row["reason"]]
    drill.wait("one ready node at the least", lambda: drill.ready() > 0)
    drill.site.sandbox.start(base)
