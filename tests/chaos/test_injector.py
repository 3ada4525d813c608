"""`raylaunch chaos` as people run it: faults in turn, each recovered, the ledger in the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from drill import Drill
from helpers import wait_for

from benchmarks import cluster_model

pytestmark = [pytest.mark.long, pytest.mark.slurm, pytest.mark.timeout(600)]


@contextmanager
def open_drill() -> Iterator[Drill]:
    with Drill.on("injector", nodes=3) as made:
        made.up(3, elastic__max_strikes=50, elastic__replace="false")
        yield made
        made.clean()


def test_workers_and_nodes_die_and_the_ledger_says_what_it_cost(drill: Drill) -> None:
    """Three faults; the node boots again. Then the run is stopped, and the model is held against the ledger."""
    site = drill.site
    steps = {"max_steps": 100000, "global_batch_size": 10, "local_batch_size": 1, "ckpt_every_steps": 5}
    command = drill.train("victim", step_scheduler=steps, trainer="trainers.fsdp:train")
    drill.wait_event("victim", "commit")
    out = site.state / "home" / "ledger.json"
    done = site.run(
        "chaos", "victim", "--faults", "worker,node", "--every", "3s", "--count", 3, "--seed", 7,
        "--limit", "2m", "--json", out, limit=400,
    )  # fmt: skip
    done.expect(0, "node", "worker", "goodput", "each exactly once; lost 0, repeated 0")
    record = json.loads(out.read_text())
    counts = {row["kind"]: (row["count"], row["recovered"], row["restarted"]) for row in record["faults"]}
    assert sum(count for count, _, _ in counts.values()) == 3
    assert all(count == recovered == restarted for count, recovered, restarted in counts.values())
    assert record["steps"]["ok"] and record["steps"]["missing"] == []
    assert 0 < record["goodput"] < 1 and record["wall"] == pytest.approx(sum(record["parts"].values()))

    # Each fault is answered by one recovery, with its phases; what it hit is on record.
    injected = drill.run_events("victim", "fault_injected")
    assert [row["seq"] for row in injected] == [1, 2, 3]
    answers = [seq for row in record["recoveries"] for seq in row["injected"]]
    assert sorted(answers) == [1, 2, 3]
    for row in record["recoveries"]:
        assert sum(row["phases"].values()) == pytest.approx(row["total"], abs=0.05)
    # The node that was killed boots again, though with nothing of ours: nobody replaces it here.
    wait_for("all nodes up", lambda: all(n.running for n in site.sandbox.status().nodes), 60)

    assert "really" in cluster_model.check_table(site.run_dir("victim"))
    site.run("stop", "victim").expect(0)
    command.ended().expect(1, "run victim is stopped")
    site.run("chaos", "victim").expect(2, "run victim is stopped")


def test_what_cannot_be_done_is_refused(drill: Drill) -> None:
    site = drill.site
    site.run("chaos", "nobody").expect(2, "no run nobody")
    site.run("chaos", "victim", "--faults", "fire").expect(2, "unknown fault fire", "slurmctld")
