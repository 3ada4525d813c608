"""Nodes that replace others, and nodes that are not wanted back. Each test has a cluster of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from drill import Drill

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(600)]


@contextmanager
def open_drill() -> Iterator[Drill]:
    with Drill.on("joining", nodes=3) as made:
        yield made


def test_a_node_that_struck_out_is_left_and_not_taken_again(drill: Drill) -> None:
    drill.cluster = "strict"
    drill.up(2, elastic__max_strikes=2)
    command = drill.train("strict")
    drill.at_gate("strict")
    victim, killed = drill.other_than_head(), ""

    def agent() -> str:
        """The pid of an agent there that is ready and was not killed."""
        row = drill.site.members(drill.cluster)[victim]
        return str(row["pid"]) if row["state"] == "ready" and str(row["pid"]) != killed else ""

    for strike in (1, 2):
        drill.wait(f"{victim} is ready", lambda: bool(agent()))
        killed = agent()
        drill.site.inside(victim, "kill", "-9", killed)
        drill.wait_cluster_event("node_strike", node=victim, count=strike)
    drill.wait_cluster_event("node_excluded", node=victim)
    joiner = drill.wait_cluster_event("joiner_submitted")
    assert victim in joiner["exclude"]
    drill.open_gate("strict")
    drill.finished(command, "strict")
    drill.wait("two ready nodes", lambda: drill.ready() == 2)
    assert victim not in drill.ready_nodes()
    drill.clean()


def test_where_nodes_may_not_submit_jobs_the_login_node_does(drill: Drill) -> None:
    """As a site forbids it: the nodes have an sbatch of their own, which refuses."""
    drill.cluster = "watched"
    sbatch, refusing = str(shutil.which("sbatch")), drill.site.state / "sbatch"
    refusing.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && exec echo slurm\necho 'sbatch: error: from login nodes only' >&2\nexit 1\n"
    )
    refusing.chmod(0o755)
    nodes = [node.name for node in drill.site.sandbox.status().nodes]
    for node in nodes:
        drill.site.inside(node, "mount", "--bind", str(refusing), sbatch)
    drill.up(2)
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
    drill.finished(command, "watched")
    drill.clean()
    watcher.ended().expect(0, "cluster watched has ended: down")
    drill.site.sandbox.start(victim)  # with a mount table of its own again
    for node in nodes:
        if node != victim:
            drill.site.inside(node, "umount", sbatch)


def test_the_head_is_away_for_longer_than_slurm_waits(drill: Drill) -> None:
    """Slurm ends the base job when its batch host comes back: the joiners go on. (Or it leaves the job: all go on.)"""
    drill.cluster = "away"
    drill.up(2)
    head = drill.head()
    command = drill.train("away", elastic={"max_nodes": 3})
    drill.at_gate("away")
    (base,) = [job.split()[0] for job in drill.site.jobs()]
    drill.site.sandbox.freeze(head)

    def joined() -> bool:
        return any(row["joiner"] and row["state"] == "ready" for row in drill.site.members(drill.cluster).values())

    drill.wait("a joiner", joined)
    goes_on = drill.thaw_too_late(head, base)
    drill.open_gate("away")
    drill.finished(command, "away")
    assert bool(drill.cluster_events("base_job_lost")) != goes_on and not drill.cluster_events("ending")
    drill.wait("two ready nodes", lambda: drill.ready() == 2)
    drill.reboot(head)
    drill.clean()
