"""Slurm's text → rows, on answers captured from Slurm 22.05.8 (tests/unit/data)."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from raylaunch.errors import SlurmError
from raylaunch.scheduler.slurm import parse
from raylaunch.scheduler.slurm.rows import ENDING, TERMINAL, WAITING, JobDetail, JobRow, JobState

DATA = Path(__file__).parent / "data"
SEP = parse.SEPARATOR


def jobs() -> dict[str, JobRow]:
    return {row.id: row for row in parse.parse_jobs((DATA / "squeue.txt").read_text())}


def test_running_job() -> None:
    row = jobs()["24"]
    assert (row.state, row.partition, row.user, row.name) == (JobState.RUNNING, "main", "root", "a b")
    assert (row.node_count, row.nodes, row.time_left, row.reason) == (2, ("node1", "node2"), 592, "")
    assert row.start is not None and row.start.replace(tzinfo=None) == datetime(2026, 11, 21, 2, 21, 31)
    assert not row.terminal and not row.waiting and row.blocked == ""


def test_waiting_job_with_and_without_estimate() -> None:
    known, unknown = jobs()["137"], jobs()["35"]
    assert known.waiting and known.start is not None and known.start.hour == 2 and known.nodes == ()
    assert known.node_count == 4 and known.reason == "Resources" and known.blocked == ""
    assert unknown.start is None and unknown.reason == "Dependency"


@pytest.mark.parametrize(
    ("job", "words"),
    [("33", "lower slurm.nodes"), ("34", "partition is down"), ("31", "held"), ("137", ""), ("37", "")],
)
def test_waiting_for_ever_is_told_from_waiting(job: str, words: str) -> None:
    assert words in jobs()[job].blocked and bool(words) == bool(jobs()[job].blocked)


def test_limits_of_account_and_qos_block() -> None:
    line = SEP.join(["1", "PENDING", "p", "u", "1", "", "N/A", "1:00", "", "(null)", "QOSMaxNodePerJobLimit", "n"])
    assert "QOSMaxNodePerJobLimit" in parse.parse_jobs(line)[0].blocked


@pytest.mark.parametrize(
    ("job", "state"),
    [("25", "COMPLETED"), ("26", "FAILED"), ("27", "CANCELLED"), ("52", "COMPLETING"), ("30_1", "RUNNING")],
)
def test_states(job: str, state: str) -> None:
    assert jobs()[job].state == state
    assert jobs()[job].terminal == (state in {"COMPLETED", "FAILED", "CANCELLED"})


def test_names_with_separators_and_line_breaks() -> None:
    assert jobs()["28"].name == "we|ird,ü"
    assert jobs()["40"].name == "two\nlines"
    line = SEP.join(["1", "RUNNING", "p", "u", "1", "n1", "N/A", "1:00", "", "(null)", "None", "un", "it"])
    assert parse.parse_jobs(line)[0].name == f"un{SEP}it"


def test_whose_a_joiner_is_and_where_it_must_not_start() -> None:
    row = jobs()["16"]
    assert row.exclude == ("node1", "node2") and row.comment.startswith("raylaunch cluster=main life=ab12 nodes=4;")
    assert jobs()["24"].exclude == () and jobs()["24"].comment == ""


def test_nodes() -> None:
    """Captured, with node3 drained by an administrator while it ran a job; node2 died, node4 reboots."""
    found = parse.parse_nodes((DATA / "nodes.txt").read_text())
    assert found["node1"].partitions == ("main", "low", "small") and found["node1"].idle and found["node1"].default
    assert found["node3"].drains and found["node3"].reason == "bad fan, see ticket"
    assert found["node2"].down and not found["node2"].idle and not found["node2"].drains
    assert not found["node4"].idle and found["node4"].flags == "*"


def test_a_reason_may_be_a_sentence() -> None:
    assert jobs()["37"].reason.startswith("Nodes required for job are DOWN, DRAINED")


def test_no_jobs() -> None:
    assert parse.parse_jobs("") == parse.parse_jobs("\n") == []


def test_another_shape_is_an_error() -> None:
    with pytest.raises(SlurmError, match="cannot parse: 'CLUSTER: x'"):
        parse.parse_jobs("CLUSTER: x")
    with pytest.raises(SlurmError, match="sinfo printed"):
        parse.parse_partitions("a b c")


def test_every_state_is_in_at_most_one_set() -> None:
    assert not (TERMINAL & WAITING or TERMINAL & ENDING or WAITING & ENDING)
    rest = set(JobState) - TERMINAL - WAITING - ENDING
    assert {"RUNNING", "CONFIGURING", "SUSPENDED", "RESIZING", "SIGNALING", "STOPPED", "UNKNOWN"} == rest


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("CANCELLED by 1000", JobState.CANCELLED),
        ("CANCELLED+", JobState.CANCELLED),
        ("completed", JobState.COMPLETED),
        ("SOMETHING_NEW", JobState.UNKNOWN),
        ("", JobState.UNKNOWN),
    ],
)
def test_parse_state(text: str, state: JobState) -> None:
    assert parse.parse_state(text) is state and (state is not JobState.UNKNOWN or state not in TERMINAL)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("9:52", 592),
        ("0:00", 0),
        ("1:00:00", 3600),
        ("1-00:00:00", 86400),
        ("2-03", 2 * 86400 + 3 * 3600),
        ("30", 1800),
        ("UNLIMITED", None),
        ("infinite", None),
        ("NOT_SET", None),
        ("INVALID", None),
        ("n/a", None),
        ("", None),
        ("-1:00", None),
        ("1:2:3:4", None),
    ],
)
def test_parse_duration(text: str, seconds: int | None) -> None:
    assert parse.parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node[1-3,7],gpu1", ("node1", "node2", "node3", "node7", "gpu1")),
        ("n[08-10]-ib", ("n08-ib", "n09-ib", "n10-ib")),
        ("", ()),
        ("(null)", ()),
        ("None assigned", ()),
    ],
)
def test_parse_hosts(text: str, hosts: tuple[str, ...]) -> None:
    assert parse.parse_hosts(text) == hosts


def test_bad_hosts() -> None:
    with pytest.raises(SlurmError, match="not a list of hosts"):
        parse.parse_hosts("a[1-")


@pytest.mark.parametrize(
    ("text", "job"),
    [("123\n", "123"), ("123;cluster\n", "123"), ("motd of the site\n123\n", "123")],
)
def test_parse_submitted(text: str, job: str) -> None:
    assert parse.parse_submitted(text) == job


@pytest.mark.parametrize("text", ["", "\n", "Submitted batch job x"])
def test_no_job_id(text: str) -> None:
    with pytest.raises(SlurmError, match="no job id"):
        parse.parse_submitted(text)


DETAIL = (
    "JobId=7 JobName=my run UserId=alice(1000) GroupId=alice(1000) MCS_label=N/A Priority=4294901756 Nice=0 Account=(null) "
    "QOS=normal JobState=COMPLETING Reason=None Dependency=(null) Requeue=1 Restarts=1 BatchFlag=2 Reboot=0 ExitCode=0:1 "
    "RunTime=00:00:21 TimeLimit=01:00:00 StartTime=2026-11-30T21:55:00 PreemptEligibleTime=2026-11-30T21:55:00 "
    "PreemptTime=None Partition=main NodeList=node[2-3] BatchHost=node1 Comment=raylaunch StdOut=/data/my job/slurm-7.out Power="
)


def test_detail() -> None:
    found = parse.parse_detail(DETAIL + "\n")
    assert found == JobDetail(False, 1, 1, Path("/data/my job/slurm-7.out"))
    preempted = parse.parse_detail(DETAIL.replace("PreemptTime=None", "PreemptTime=2026-11-30T21:56:15"))
    assert preempted is not None and preempted.preempted
    odd = DETAIL.replace("my run", "a Restarts=9 ExitCode=0:15").replace("=raylaunch", "=Restarts=9 ExitCode=0:15")
    assert parse.parse_detail(odd) == found  # a name and a comment may be anything
    assert parse.parse_detail("") is None and parse.parse_detail("slurm_load_jobs error") is None


def test_finished() -> None:
    failed, cancelled, running, launch = parse.parse_finished((DATA / "sacct.txt").read_text())
    assert (failed.id, failed.state, failed.exit_code, failed.signal) == ("9", JobState.FAILED, 3, 0)
    assert cancelled.state is JobState.CANCELLED and cancelled.nodes == ("node1", "node2")
    assert running.state is JobState.RUNNING and running.reason == ""
    assert (launch.exit_code, launch.signal) == (0, 53)


def test_partitions() -> None:
    rows = parse.parse_partitions((DATA / "sinfo.txt").read_text())
    assert list(dict.fromkeys(row.name for row in rows)) == ["main", "low", "small", "down"]
    main = [row for row in rows if row.name == "main"]
    assert [(row.state, row.flags) for row in main] == [
        ("down", "*"),
        ("drained", ""),
        ("mixed", ""),
        ("allocated", ""),
    ]
    first = main[0]
    assert first.default and first.up and first.time_limit == 86400
    assert (first.node_count, first.cpus, first.memory, first.gpus) == (1, 4, 24105, 2)
    assert not rows[-1].up and rows[-1].time_limit is None and not rows[-1].default


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:2", 2),
        ("gpu:a100:4(S:0-1)", 4),
        ("gpu:a:1,gpu:b:2,shard:8", 3),
        ("gpu", 1),
        ("(null)", 0),
        ("fpga:1", 0),
    ],
)
def test_gpus(gres: str, gpus: int) -> None:
    line = SEP.join(["main*", "up", "infinite", "2", "idle~", "64+", "128000+", gres])
    row = parse.parse_partitions(line)[0]
    assert (row.gpus, row.cpus, row.memory, row.state, row.flags) == (gpus, 64, 128000, "idle", "~")
