"""The load of nodes: what is measured here, what the head makes of it, what of it is news."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylaunch.cluster.telemetry.collect import Collector
from raylaunch.cluster.telemetry.kernel import KernelLog
from raylaunch.cluster.telemetry.load_table import FIRST_PERIOD, POINTS, LoadSeries, LoadTable, flat
from raylaunch.cluster.telemetry.sample import Gpus, Sampler
from raylaunch.host.resources import Resources
from raylaunch.state.node_events import GpuTrouble, OomKill

HERE = Resources(cpus=2, memory=1000, object_store=1, gpus=())
GPU = {"util": 0.5, "memory": 0.25, "watts": 300, "temperature": 60, "throttled": "", "ecc_errors": 0}


def test_this_machine() -> None:
    """Without a cgroup of its own, the machine's own figures."""
    load = Sampler(HERE, None, None, None).sample()
    assert load.keys() == {"cpu", "memory"} and 0 <= load["cpu"] <= 1 and 0 < load["memory"] < 1


def test_a_cgroup(tmp_path: Path) -> None:
    """Against what the job was given; what the page cache would give back does not count."""
    (tmp_path / "cpu.stat").write_text("usage_usec 1000000\nuser_usec 1\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200\n")
    (tmp_path / "memory.events").write_text("low 0\noom 4\noom_kill 3\n")
    sampler = Sampler(HERE, tmp_path, None, None)
    (tmp_path / "cpu.stat").write_text("usage_usec 99000000\n")
    assert sampler.sample() == {"cpu": 1.0, "memory": 0.5, "oom_kills": 3}


def test_no_gpus() -> None:
    assert Gpus.open([]) is None
    if not Path("/dev/nvidiactl").exists():
        assert Gpus.open(["0"]) is None


def test_gpus_of_a_node_in_one_line() -> None:
    hot = {**GPU, "util": 1.0, "temperature": 80, "throttled": "hardware thermal", "ecc_errors": 2}
    assert flat({"cpu": 0.1, "gpus": [GPU, hot]}) == {
        "cpu": 0.1, "gpus": 2, "gpu": 0.75, "gpu_memory": 0.25, "watts": 600, "temperature": 80, "ecc_errors": 2,
        "throttled": "GPU 1: hardware thermal",
    }  # fmt: skip
    assert flat({"cpu": 0.1}) == {"cpu": 0.1}


def test_news_is_told_once() -> None:
    table = LoadTable()
    assert table.take("n1", {"oom_kills": 2, "gpus": [{**GPU, "ecc_errors": 5}]}, 0) == []  # of before our time
    assert table.take("n1", {"oom_kills": 3, "gpus": [{**GPU, "ecc_errors": 6}]}, 5) == [
        OomKill("n1", count=1),
        GpuTrouble("n1", "6 uncorrected ECC errors"),
    ]
    slow = {"oom_kills": 3, "gpus": [{**GPU, "ecc_errors": 6, "throttled": "power brake"}]}
    assert table.take("n1", slow, 10) == [GpuTrouble("n1", "throttled: GPU 0: power brake")]
    assert table.take("n1", slow, 15) == []


OOM = (
    "6,1189,5140900,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/x,"
    "task_memcg={cgroup},task=python3,pid=77,uid={uid}\n"
)


@pytest.mark.parametrize(
    ("cgroup", "uid", "is_ours"),
    [
        ("/slurm/uid_0/job_12/step_0/task_0", 0, True),
        ("/slurm/job_123", 0, False),
        ("/user", 0, True),
        ("/job_12", 1, False),
    ],
)
def test_what_the_kernel_says(tmp_path: Path, cgroup: str, uid: int, is_ours: bool) -> None:
    log = tmp_path / "kmsg"
    log.write_text("4,1,1,-;of before our time: " + OOM.format(cgroup="/user", uid=os.getuid()))
    kernel = KernelLog("12", str(log))
    with log.open("a") as out:
        out.write("6,2,2,-;eth0: link becomes ready\n" + OOM.format(cgroup=cgroup, uid=os.getuid() + uid))
        out.write("4,3,3,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.\n")
    fell = {"kind": "gpu_trouble", "what": "Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus."}
    killed = {"kind": "oom_kill", "pid": 77, "task": "python3"}
    assert kernel.news() == ([killed, fell] if is_ours else [fell])
    assert kernel.news() == []
    assert KernelLog("12", str(tmp_path / "none")).news() == []


def test_the_kernel_s_word_comes_before_the_counts() -> None:
    table = LoadTable()
    table.take("n1", {"oom_kills": 0}, 0)
    told = table.take("n1", {"oom_kills": 1, "kernel": [{"kind": "oom_kill", "pid": 77, "task": "python3"}]}, 5)
    assert told == [OomKill("n1", 77, "python3")]
    assert "kernel" not in table.latest["n1"]


@pytest.mark.parametrize("load", [
    {"gpus": 5}, {"gpus": [5]}, {"gpus": [{"util": "x", "watts": "x"}]}, {"kernel": 5}, {"kernel": [{}]}, {"cpu": "x"},
    {"kernel": [{"kind": "oom_kill"}]}, {"kernel": [{"kind": "of a newer version"}]}, {"oom_kills": "x"}, {"memory": [1]},
])  # fmt: skip
def test_a_load_of_another_version_ends_no_head(tmp_path: Path, load: dict[str, Any]) -> None:
    collector = Collector(tmp_path, "canary", lambda: None, lambda event: None, lambda: [])
    collector.take("a", load)
    collector.take("a", {"cpu": 0.5, "oom_kills": 0, "gpus": [{"util": 0.5, "watts": 300}]})
    collector.take("a", load)
    assert collector._table.row(time.time())["nodes"] == 1


def test_all_nodes_in_one_line() -> None:
    table = LoadTable()
    table.take("n1", {"cpu": 0.2, "memory": 0.5, "gpus": [GPU]}, 100.0)
    table.take("n2", {"cpu": 0.4, "memory": 0.7, "gpus": [{**GPU, "util": 0.1}]}, 101.0)
    table.take("gone", {"cpu": 1.0, "memory": 1.0}, 10.0)
    assert table.row(102.0) == {
        "time": 102.0, "nodes": 2, "cpu": 0.3, "memory": 0.6, "gpu": 0.3, "gpu_memory": 0.25, "watts": 600,
        "temperature": 60, "least": "n2",
    }  # fmt: skip
    heir = LoadTable()
    heir.inherit(json.loads(json.dumps(table.histories())))
    assert heir.histories() == table.histories()
    table.keep(["n1"])
    assert table.latest.keys() == table.histories().keys() == {"n1"}


@given(st.lists(st.tuples(st.floats(0, 5000), st.floats(0, 1)), min_size=1, max_size=300))
def test_a_history_stays_small_and_covers_it_all(steps: list[tuple[float, float]]) -> None:
    series, now = LoadSeries(0.0), 0.0
    for pause, value in steps:
        now += pause
        series.add(now, [value, None, None, None])
    assert len(series.points) < POINTS
    assert len(series.points) * series.period <= now < (len(series.points) + 1) * series.period
    assert series.period >= FIRST_PERIOD
    assert len(json.dumps(series.as_dict())) < 3000
