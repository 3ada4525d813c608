"""The allocation ends while the run goes on: its time is up, or another job takes its nodes. The run is
saved where there is notice, and goes on in the next allocation, on the undisturbed curve."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import gate
import pytest
from drill import OTHER_SIZE, SAME_SIZE, Drill
from helpers import wait_for
from undisturbed import STEPS

from raylaunch.scheduler.slurm.parse import parse_duration

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@contextmanager
def open_drill() -> Iterator[Drill]:
    with Drill.on("allocation", nodes=2) as made:
        yield made


def submit(drill: Drill, run: str, **changes: object) -> str:
    """A batch job of its own for the run; its id."""
    drill.cluster = run
    slurm = {"nodes": 2, **dict(changes.pop("slurm", {}))}  # type: ignore[call-overload]
    done = drill.site.run("submit", drill.config(run, slurm=slurm, **changes), "--run", run).expect(0)
    return done.out.strip()


def ended_well(drill: Drill, run: str, relative: float = SAME_SIZE) -> None:
    drill.finished(drill.site.start("attach", run), run, relative)
    drill.site.wait_clean(90)


def next_allocation(drill: Drill, run: str, number: int) -> None:
    """Until a head of the cluster begins for the `number`-th time; without the two minutes that a requeued job waits."""

    def begun() -> bool:
        for job, now in map(str.split, drill.site.jobs()):
            if now == "PENDING":  # it may begin in this moment, which is no failure
                drill.site.slurm("sh", "-c", f"scontrol update jobid={job} StartTime=now || true")
        return len(drill.cluster_events("head_started")) >= number

    drill.wait("the next allocation", begun)


def seconds(drill: Drill, job: str) -> int:
    """For which a job has been running."""
    return parse_duration(drill.site.slurm("squeue", "-h", "-j", job, "-o", "%M")) or 0


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_chain_of_jobs_finishes_the_run(drill: Drill) -> None:
    """Two run into their real time limits, the third finishes. In each of the two the run waits at its gate until it is
    asked to save."""
    job = submit(
        drill, "chain", slurm={"time": 2, "signal": "B:USR1@75"}, step_scheduler={"max_steps": STEPS, "ckpt_every_steps": 40},
        alerts={"command": ["true"], "min_interval": 0},
    )  # fmt: skip
    attempt = 0
    for number in (1, 2):
        saved = 0 if number == 1 else gate.FIRST + 1
        attempt = drill.at_gate("chain", saved or gate.FIRST, after=attempt, commit=saved)
        assert drill.wait_cluster_event("requeued", count=number)["job"] == job
        ended = drill.run_events("chain", "attempt_ended")[-1]
        last = drill.run_events("chain", "commit")[-1]["step"]
        assert ended["committed"] == ended["step"] == last  # saved in time: nothing is done twice
        next_allocation(drill, "chain", number + 1)
    drill.site.slurm("scontrol", "update", f"jobid={job}", "TimeLimit=30")  # enough, however busy the machine is
    drill.open_gate("chain")
    assert {row["why"] for row in drill.cluster_events("termination_notice")} == {"walltime"}
    ended_well(drill, "chain")
    alerts = [event["alert"] for event in drill.run_events("chain", "alert")]
    assert (alerts.count("started"), alerts.count("held"), alerts[-1]) == (3, 2, "finished")  # in each allocation, once
    assert "ExitCode=0:0" in drill.site.slurm("scontrol", "show", "job", job)


@pytest.mark.parametrize(
    ("partition", "grace"),
    [
        ("low", True),
        *(pytest.param(*row, marks=pytest.mark.long) for row in (("low", False), ("lowc", True), ("lowc", False))),
    ],
)
def test_preempted(drill: Drill, partition: str, grace: bool) -> None:
    """`low` requeues what it preempts, `lowc` cancels it; with grace there is time to save."""
    run = f"preempted-{partition}-{'grace' if grace else 'none'}"
    drill.site.slurm("scontrol", "update", f"partition={partition}", f"GraceTime={10 if grace else 0}")
    submit(drill, run, slurm={"partition": partition})
    drill.at_gate(run)
    other = drill.site.slurm("sbatch", "--parsable", "-N2", "--exclusive", "-p", "main", "--wrap", "sleep 300").strip()
    drill.wait("the other job runs", lambda: f"{other} RUNNING" in drill.site.jobs())
    drill.open_gate(run)
    if grace:
        ended = drill.run_events(run, "attempt_ended")[-1]
        assert ended["how"] == "stopped" and ended["committed"] == ended["step"]
    wait_for("a job that waits", lambda: any("PENDING" in job for job in drill.site.jobs()), 60)
    drill.site.slurm("scancel", other)
    next_allocation(drill, run, 2)
    ended_well(drill, run)


@pytest.mark.long
def test_a_job_that_waits_again_already_gets_no_successor(drill: Drill) -> None:
    """Slurm may requeue a preempted job before its head asks for that: two allocations of one cluster would fight."""
    job = drill.site.slurm("sbatch", "--parsable", "--hold", "--wrap", "true").strip()
    ask = (
        "import sys; from pathlib import Path; from raylaunch.scheduler.slurm.allocation import *;"
        "print([event.kind for event in go_on(Path('/nowhere'), sys.argv[1], 'preempted', Continuation.REQUEUE)])"
    )
    try:
        assert drill.site.inside("node1", sys.executable, "-c", ask, job).strip() == "['requeued']"
        assert [row.split()[0] for row in drill.site.jobs()] == [job]
    finally:
        drill.site.slurm("scancel", job)


@pytest.mark.long
def test_the_batch_host_is_away_for_longer_than_slurm_waits(drill: Drill) -> None:
    """Slurm ends the whole job when it comes back. Nobody asked for that: a successor goes on. (Or Slurm leaves it.)"""
    job = submit(drill, "away", slurm={"nodes": "1-2"}, elastic={"replace": False, "max_nodes": 3})
    attempt = drill.at_gate("away")
    assert drill.sizes("away")[-1] == 2
    host = drill.head()
    drill.site.sandbox.freeze(host)
    drill.at_gate("away", after=attempt)  # the other node alone
    if drill.thaw_too_late(host, job):
        drill.reboot(host)
    else:
        drill.wait_cluster_event("successor")
    drill.open_gate("away")
    drill.finished(drill.site.start("attach", "away"), "away", OTHER_SIZE)
    drill.reboot(host)  # the successor may not have been there
    drill.site.wait_clean(90)
    assert drill.sizes("away")[1] == 1


@pytest.mark.long
@pytest.mark.parametrize("requeue", [True, False])
def test_the_batch_host_boots_before_slurm_found_it_dead(drill: Drill, requeue: bool) -> None:
    """Slurm finds no batch script there and ends the whole job; it runs it again, where it may. No person asked for the
    end: the run goes on."""
    run = f"booted-{'requeue' if requeue else 'no-requeue'}"
    with drill.patient_slurm():
        if requeue:
            submit(drill, run)
        else:
            drill.cluster = run
            drill.up(2, options=["--no-requeue"])
            drill.train(run)
        job = drill.site.jobs()[0].split()[0]
        assert f"Requeue={requeue:d}" in drill.site.slurm("scontrol", "show", "job", job)
        attempt, host, incarnation = drill.at_gate(run), drill.head(), drill.incarnation()
        # Where a job is young, or Slurm was configured anew a moment ago, it does not expect the batch script yet
        # (BatchStartTimeout and MessageTimeout), and lets the job go on.
        drill.wait("a job that is old enough", lambda: seconds(drill, job) > 45)
        drill.site.sandbox.kill(host)
        drill.wait_another_head(incarnation)
        drill.site.sandbox.start(host)
        drill.wait_cluster_event("requeued" if requeue else "successor")
    next_allocation(drill, run, 3)
    drill.at_gate(run, after=attempt)
    drill.open_gate(run)
    drill.finished(drill.site.start("attach", run), run, OTHER_SIZE)
    if not requeue:
        drill.site.run("down", run).expect(0)
    drill.site.wait_clean(90)


@pytest.mark.long
def test_requeues_are_capped(drill: Drill) -> None:
    job = submit(drill, "capped", elastic={"max_requeues": 0})
    drill.at_gate("capped")
    drill.site.slurm("scancel", "--signal=USR1", "--batch", job)
    drill.wait_cluster_event("ended")
    drill.site.wait_clean(60)
    assert drill.cluster_events("max_requeues_reached") and not drill.cluster_events("requeued")
    assert drill.site.run_status("capped")["state"] == "stopped"


def test_a_cancelled_job_stays_cancelled(drill: Drill) -> None:
    """A person's scancel is no fault: nothing comes after it."""
    job = submit(drill, "cancelled", alerts={"command": ["true"]})
    drill.at_gate("cancelled")
    drill.site.slurm("scancel", job)
    wait_for("the job's end", lambda: not drill.site.jobs(), 60)
    drill.site.wait_clean(30)
    assert [event["alert"] for event in drill.run_events("cancelled", "alert")] == ["started", "stopped"]
    assert not drill.cluster_events("requeued") and not drill.cluster_events("successor")
