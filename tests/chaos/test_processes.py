"""A process dies: a worker, the raylet, an agent, the driver, Ray's GCS, the dashboard. The node stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from drill import OTHER_SIZE, SAME_SIZE, Drill
from helpers import wait_for

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(400)]


@contextmanager
def open_drill() -> Iterator[Drill]:
    """A cluster of three nodes, which replaces none: what a process does to it must mend by itself."""
    with Drill.on("processes", nodes=3) as made:
        made.up(3, elastic__replace="false", elastic__max_strikes=50)
        yield made
        made.clean()


def test_a_worker_is_killed(drill: Drill) -> None:
    command = drill.train("worker")
    node, pid = drill.worker("worker", 1)
    drill.at_gate("worker")
    drill.site.inside(node, "kill", "-9", pid)
    drill.open_gate("worker")
    drill.finished(command, "worker", SAME_SIZE)
    drill.recovered("worker", 3)
    ended = drill.run_events("worker", "attempt_ended")[0]
    # On a busy machine a survivor's broken connection is told before the death behind it.
    assert ended["how"] == "fault" and ended["cause"] in {"worker_lost", "communication"}


def test_the_raylet_is_killed(drill: Drill) -> None:
    """The agent starts it again; the run goes on without the node or with it, as it comes."""
    node = next(n for n in drill.nodes() if n != drill.head())
    command = drill.train("raylet")
    drill.at_gate("raylet")
    ports = drill.site.members(drill.cluster)[node]["ports"]
    drill.site.inside(node, "pkill", "-9", "-x", "raylet")
    drill.wait_cluster_event("node_restarting", node=node)
    drill.open_gate("raylet")
    drill.finished(command, "raylet")
    drill.wait_nodes(**dict.fromkeys(drill.nodes(), "ready"))
    assert drill.site.members(drill.cluster)[node]["ports"] != ports  # the GCS has given up on the old ones


def test_ray_s_directory_is_removed(drill: Drill) -> None:
    """As by a cleaner of /tmp: Ray would live on and start no worker again, so it is started anew."""
    node = next(n for n in drill.nodes() if n != drill.head())
    command = drill.train("cleaned")
    drill.at_gate("cleaned")
    drill.site.inside(node, "rm", "-rf", str(drill.site.members(drill.cluster)[node]["temp_dir"]))
    drill.wait_cluster_event("node_restarting", node=node)
    drill.open_gate("cleaned")
    drill.finished(command, "cleaned")
    drill.wait_nodes(**dict.fromkeys(drill.nodes(), "ready"))


def test_an_agent_is_killed(drill: Drill) -> None:
    """The node counts as lost at once, and comes back by its keeper."""
    node = next(n for n in drill.nodes() if n != drill.head())
    command = drill.train("agent")
    drill.at_gate("agent")
    before = len(drill.cluster_events("node_lost"))
    drill.site.inside(node, "kill", "-9", str(drill.site.members(drill.cluster)[node]["pid"]))
    drill.wait_cluster_event("node_lost", node=node)
    assert len(drill.cluster_events("node_lost")) == before + 1
    drill.open_gate("agent")
    drill.finished(command, "agent")
    drill.wait_nodes(**dict.fromkeys(drill.nodes(), "ready"))
    assert {row["cause"] for row in drill.run_events("agent", "fault")} == {"node_lost"}


def test_the_driver_is_killed(drill: Drill) -> None:
    command = drill.train("driver")
    drill.at_gate("driver")
    drill.site.inside(drill.head(), "pkill", "-9", "-f", "raylaunch.training.driver")
    drill.wait_cluster_event("driver_lost", run="driver")
    drill.open_gate("driver")
    drill.finished(command, "driver", SAME_SIZE)
    drill.recovered("driver", 3)


def test_the_dashboard_is_killed(drill: Drill) -> None:
    """The run does not notice, and there is a dashboard again."""
    incarnation, head = drill.incarnation(), drill.head()
    pattern = "dashboard/dashboard.py"

    def pid() -> str:
        found = drill.site.sandbox.exec(head, ["pgrep", "-f", pattern], capture_output=True, text=True, timeout=30)
        return str(found.stdout).strip()

    wait_for("a dashboard", pid, 60)
    before = pid()
    command = drill.train("dashboard")
    drill.at_gate("dashboard")
    drill.site.inside(head, "pkill", "-9", "-f", pattern)
    wait_for("another dashboard", lambda: pid() not in {"", before}, 60)
    drill.open_gate("dashboard")
    drill.finished(command, "dashboard", SAME_SIZE)
    assert drill.sizes("dashboard") == [3] and drill.incarnation() == incarnation


def test_the_gcs_is_killed(drill: Drill) -> None:
    """Ray's heart: the head resigns, another node is elected, the old one comes back as a member."""
    incarnation, head, jobs = drill.incarnation(), drill.head(), drill.site.jobs()
    command = drill.train("gcs")
    drill.at_gate("gcs")
    drill.site.inside(head, "pkill", "-9", "-x", "gcs_server")
    drill.wait_another_head(incarnation, but=head)
    drill.open_gate("gcs")
    drill.finished(command, "gcs", OTHER_SIZE)
    assert drill.site.cluster_status(drill.cluster)["incarnation"] == drill.incarnation()
    drill.wait_nodes(**dict.fromkeys(drill.nodes(), "ready"))
    assert drill.site.jobs() == jobs  # the allocation is the same: no requeue


def test_the_head_s_agent_is_killed(drill: Drill) -> None:
    incarnation = drill.incarnation()
    command = drill.train("headless")
    drill.at_gate("headless")
    head = drill.head()
    drill.site.inside(head, "kill", "-9", str(drill.site.members(drill.cluster)[head]["pid"]))
    drill.wait_another_head(incarnation)
    drill.open_gate("headless")
    drill.finished(command, "headless", OTHER_SIZE)
    drill.wait_nodes(**dict.fromkeys(drill.nodes(), "ready"))


def test_slurm_kills_the_step(drill: Drill) -> None:
    """srun gives the whole step up when a dead node answers again too early (it sees a reset connection): all
    agents are killed at once. The batch script starts them again, and they elect a head."""
    incarnation = drill.incarnation()
    command = drill.train("step")
    drill.at_gate("step")
    (job,) = [line.split()[0] for line in drill.site.jobs()]
    drill.site.slurm("scancel", "--signal=KILL", f"{job}.0")
    drill.wait_another_head(incarnation)
    drill.open_gate("step")
    drill.finished(command, "step", OTHER_SIZE)
    drill.wait_nodes(**dict.fromkeys(drill.nodes(), "ready"))
    assert drill.site.jobs() == [f"{job} RUNNING"]
