"""Nodes that come from another partition, and go when somebody else wants them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import gate
import pytest
from drill import Drill

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(600)]


@contextmanager
def open_drill() -> Iterator[Drill]:
    """A base of one node, and two preemptible ones that joined it."""
    with Drill.on("guests", nodes=3) as made:
        made.site.slurm("scontrol", "update", "partition=low", "GraceTime=20")
        made.up(1, elastic__max_nodes=3, elastic__join__partition="low")
        made.wait("two guests", lambda: made.ready() == 3)
        yield made
        made.clean()


def test_idle_nodes_of_another_partition_are_taken_and_given_back(drill: Drill) -> None:
    """They go to another job with no step lost, and come again."""
    command = drill.train("guests", elastic={"max_nodes": 3})
    attempt = drill.at_gate("guests")
    other = drill.site.slurm("sbatch", "--parsable", "-N2", "--exclusive", "-p", "main", "--wrap", "sleep 300").strip()
    drill.wait_event("guests", "attempt_started", workers=1)
    drill.wait("the other job runs", lambda: f"{other} RUNNING" in drill.site.jobs())
    saved = gate.FIRST + 1  # by the drain; a run that has done no step yet does not grow
    drill.open_gate("guests", saved + 1)
    attempt = drill.at_gate("guests", saved + 1, after=attempt, commit=saved)
    drill.site.slurm("scancel", other)
    drill.wait("three ready nodes", lambda: drill.ready() == 3)
    drill.wait_event("guests", "resize_requested", attempt=attempt, why="grow")
    drill.open_gate("guests")
    drill.finished(command, "guests")
    sizes = drill.sizes("guests")
    assert sizes[0] == 3 and 1 in sizes and sizes[-1] == 3, sizes
    for row in drill.run_events("guests", "attempt_ended"):
        assert row["how"] in {"resized", "finished"} and row["step"] == row["committed"], row


def test_a_guest_that_leads_is_preempted(drill: Drill) -> None:
    """Its own job ends, not the cluster's: another node leads."""
    incarnation = drill.incarnation()
    command = drill.train("led")
    attempt = drill.at_gate("led")
    drill.site.inside(drill.head(), "pkill", "-9", "-x", "gcs_server")  # the base's node leads no more
    drill.wait_another_head(incarnation)
    leader = drill.head()
    assert drill.site.members(drill.cluster)[leader]["joiner"]
    attempt = drill.at_gate("led", after=attempt)
    other = ["sbatch", "--parsable", "-w", leader, "--exclusive", "-p", "main", "--wrap", "sleep 300"]
    job = drill.site.slurm(*other).strip()
    drill.wait("another head", lambda: drill.head() != leader)
    drill.wait_event("led", "resize_requested", attempt=attempt, why="drain")  # saved and left first
    drill.open_gate("led")
    drill.site.slurm("scancel", job)
    drill.finished(command, "led")
    assert not drill.cluster_events("ending")


def test_a_base_that_slurm_runs_again_beside_a_guest(drill: Drill) -> None:
    """The base's only node dies; Slurm queues the job anew and starts it on a guest's node: one agent of the two
    stays, and does not mind the other's end."""
    incarnation = drill.incarnation()
    drill.wait("all three nodes", lambda: drill.ready() == 3)
    base = next(row["name"] for row in drill.site.members(drill.cluster).values() if not row["joiner"])
    allocation = drill.allocation()
    command = drill.train("again", elastic={"max_nodes": 4})
    drill.at_gate("again")
    drill.site.sandbox.kill(base)
    drill.wait("the base again", lambda: drill.allocation() != allocation)
    drill.open_gate("again")
    drill.finished(command, "again")
    assert drill.incarnation() > incarnation
    assert not [row for row in drill.cluster_events("node_strike") if "could not start" in row["reason"]]
    drill.wait("one ready node at the least", lambda: drill.ready() > 0)
    drill.site.sandbox.start(base)
