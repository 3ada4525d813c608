"""What Prometheus gets: from a cluster's files by our server, and into a real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from raylaunch.cluster.telemetry import collect
from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.observe.prometheus import exporter, scrape_config
from raylaunch.state import event_log, files, records
from raylaunch.state.head_state import HeadState
from raylaunch.state.records import Cluster, Head
from raylaunch.state.runs import Run

NOW = 1_700_000_000.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a cluster of two nodes, one of them with GPUs, that trains."""
    directory = files.make_dir(tmp_path_factory.mktemp("state") / "clusters" / "c")
    files.make_dir(directory / "logs")
    Cluster("c", "local", 1, "canary", NOW, 1, 2, 1).write(directory / records.CLUSTER_FILE)
    Head("canary", 3, "n1", "host", "127.0.0.1", 10241, "127.0.0.1:10242", 10243, NOW).write(
        directory / records.HEAD_FILE
    )
    nodes = [
        {"name": f"n{i}", "address": f"127.0.0.{i}", "state": now, "ports": [10240, 10751], "role": "worker"}
        for i, now in ((1, "ready"), (2, "lost"))
    ]
    files.write_json(directory / records.MEMBERS_FILE, {"canary": "canary", "nodes": nodes})
    HeadState("canary", running="r", wanted=2, strikes={"n2": 1}).write(directory / records.DUTIES_FILE)
    loads = {"n1": {"time": NOW, "cpu": 0.5, "memory": 0.25, "gpu": 0.9, "gpu_memory": 0.8, "watts": 700,
                    "temperature": 61, "ecc_errors": 0, "oom_kills": 2}, "n2": {"time": NOW, "cpu": 0.1, "memory": 0.2}}  # fmt: skip
    files.write_json(directory / collect.LATEST_FILE, {"canary": "canary", "nodes": loads})
    event_log.write(directory, "node_lost", node="n2")
    run = files.make_dir(directory.parent.parent / "runs" / "r")
    Run("r", "running", "c", NOW, attempt=2).write(run / records.RUN_FILE)
    files.write_text(run / records.CONFIG_FILE, loader.dump(Config()))
    event_log.write(run, "commit", attempt=1, step=5, seconds=1.0)
    for step in range(1, 8):
        files.append_line(run / files.METRICS_FILE, {
            "step": step, "loss": 5.0 - step, "lr": 0.1, "grad_norm": 1.0, "tokens": 100 * step, "tokens_per_s": 10.0,
            "data_wait": 0.0, "world_size": 2, "attempt": 2, "time": NOW + step})  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def served(cluster: Path) -> Iterator[str]:
    """The address of a server of it, as a head starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "raylaunch.observe.prometheus.exporter", str(cluster), "127.0.0.1", str(port)]
    process = subprocess.Popen(command)
    try:
        until(lambda: (cluster / exporter.ADDRESS_FILE).exists(), "its address")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def until(condition: Any, what: str, limit: float = 120.0) -> Any:
    deadline = time.monotonic() + limit
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {limit:g} s: {what}"
        time.sleep(0.1)
    return found


def get(url: str, token: str = "") -> tuple[int, str]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_only_for_who_knows_the_token(cluster: Path, served: str) -> None:
    token = exporter.token(cluster.parent.parent)
    assert get(f"{served}/metrics")[0] == get(f"{served}/metrics", "guess")[0] == 401
    assert get(f"{served}/token", token)[0] == 404
    assert get(f"{served}/metrics", token)[0] == 200
    assert (cluster.parent.parent / exporter.TOKEN_FILE).stat().st_mode & 0o777 == 0o600


def test_what_is_told(cluster: Path, served: str) -> None:
    text = get(f"{served}/metrics", exporter.token(cluster.parent.parent))[1]
    told = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    expected = {
        'raylaunch_cluster_nodes{cluster="c",state="ready"}': 1, 'raylaunch_cluster_nodes{cluster="c",state="lost"}': 1,
        'raylaunch_cluster_incarnation{cluster="c"}': 3, 'raylaunch_node_strikes{cluster="c",node="n2"}': 1,
        'raylaunch_node_gpu_ratio{cluster="c",node="n1"}': 0.9, 'raylaunch_node_cpu_ratio{cluster="c",node="n2"}': 0.1,
        'raylaunch_node_oom_kills_total{cluster="c",node="n1"}': 2, 'raylaunch_run_step{cluster="c",run="r"}': 7,
        'raylaunch_run_loss{cluster="c",run="r"}': -2, 'raylaunch_run_tokens{cluster="c",run="r"}': 700,
        'raylaunch_run_last_commit_step{cluster="c",run="r"}': 5, 'raylaunch_run_attempts_total{cluster="c",run="r"}': 2,
        'raylaunch_run_events_total{cluster="c",kind="commit",run="r"}': 1, 'raylaunch_run_up{cluster="c",run="r"}': 1,
        'raylaunch_cluster_events_total{cluster="c",kind="node_lost"}': 1,
    }  # fmt: skip
    assert {key: float(told[key]) for key in expected} == expected


def test_the_dashboard_asks_for_what_there_is(cluster: Path, served: str, tmp_path: Path) -> None:
    text = get(f"{served}/metrics", exporter.token(cluster.parent.parent))[1]
    scrape_config.write(cluster.parent.parent, tmp_path)
    asked = set(re.findall(r"raylaunch_\w+", (tmp_path / scrape_config.DASHBOARD).read_text()))
    assert asked and asked <= set(re.findall(r"^(raylaunch_\w+)", text, re.M))
    assert json.loads((tmp_path / scrape_config.RAY_DASHBOARD).read_text())["panels"]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's package prometheus")
def test_a_real_prometheus_scrapes_it(cluster: Path, served: str, tmp_path: Path) -> None:
    """With the files that `metrics export` writes, and no others."""
    scrape_config.write(cluster.parent.parent, tmp_path)
    file = tmp_path / scrape_config.SCRAPE
    config = yaml.safe_load(file.read_text())
    config["global"]["scrape_interval"] = "1s"
    file.write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=log)

    def answer(query: str) -> Any:
        try:
            return json.loads(get(f"http://127.0.0.1:{port}/api/v1/query?query={query}")[1])["data"]["result"]
        except (OSError, ValueError):
            return []

    try:
        (found,) = until(lambda: answer("raylaunch_run_step"), "a scrape")
        assert found["metric"]["cluster"] == "c" and found["value"][1] == "7"
        (up,) = [row for row in answer("up") if row["metric"]["job"] == "raylaunch"]
        assert up["value"][1] == "1"
        rays = until(lambda: [row for row in answer("up") if row["metric"]["job"] == "ray"], "Ray's node")
        assert [row["metric"]["instance"] for row in rays] == ["127.0.0.1:10249"]
    finally:
        process.terminate()
        process.wait(20)
