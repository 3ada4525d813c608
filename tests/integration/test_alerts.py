"""Alerts over real HTTP, to a server that fails, hangs and recovers, from the process that sends them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from raylaunch.cluster.head.context import HeadContext
from raylaunch.cluster.head.drivers import Drivers
from raylaunch.config.schema import Config
from raylaunch.host import sidecar
from raylaunch.state import event_log, files, runs
from raylaunch.state.records import Cluster
from raylaunch.tools.sandbox.procs import wait_for

PATIENCE = 120.0
PATH = "/services/s3cr3t"
QUICK = "sender.PAUSE = 0.1"
IMPATIENT = f"{QUICK}; alert_sinks.HTTP_LIMIT, sender.LAST_LIMIT = 1.0, 3.0"


class Site(ThreadingHTTPServer):
    """Answers as `plan` says, request by request, then with 200. `got`: the bodies that it took, by path."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.plan: list[Any] = []
        self.got: dict[str, list[dict[str, Any]]] = {}
        self.asked = 0
        self.open = threading.Event()
        """What hangs goes on when it is set."""
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def address(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{PATH}/{name}"

    def texts(self, name: str) -> list[str]:
        return [str(body["text"]) for body in self.got.get(name, [])]


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_POST(self) -> None:
        self.server.asked += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.server.plan.pop(0) if self.server.plan else 200
        if answer == "hang":
            self.server.open.wait(60)
            return
        if answer == "drip":  # a header that never ends, a byte at a time: no single read times out
            with contextlib.suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                while not self.server.open.wait(0.05):
                    self.wfile.write(b"H")
            return
        if answer == "close":
            return
        status, headers = answer if isinstance(answer, tuple) else (answer, {})
        if status == 200:
            self.server.got.setdefault(self.path.rpartition("/")[2], []).append(body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"ok" if status == 200 else f"what is {self.path}?".encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.open.set()
    made.shutdown()
    made.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory; `hand_over` fills it."""
    return tmp_path / "state" / "runs" / "r"


def hand_over(run: Path, **own: Any) -> None:
    cluster = files.make_dir(run.parents[1] / "clusters" / "main")
    event_log.write(cluster, "node_lost", node="n0", reason="before this run")
    event_log.write(cluster, "run_started", run="r")
    own = {"min_interval": 0, "max_per_hour": 1000, **own}
    with runs.prepared(run, Config.model_validate({"alerts": own}), "main"):
        pass
    event_log.write(run, "attempt_started", attempt=1, workers=2, nodes=1, on=["n1"], from_step=0)


def begin(run: Path, limits: str = QUICK) -> subprocess.Popen[bytes]:
    code = f"from raylaunch.observe.alerts import alert_sinks, sender; {limits}; sender.main()"
    with (run / "logs" / "driver.log").open("ab") as out:
        return subprocess.Popen([sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stderr=out)


def kill(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.kill()
    process.wait()
    process.stdin.close()


def lose(run: Path, *nodes: int) -> None:
    for node in nodes:
        event_log.write(run.parents[1] / "clusters" / "main", "node_lost", node=f"n{node}", reason="silent")


def end(run: Path, process: subprocess.Popen[bytes]) -> None:
    """Let the run fail, and its process end by itself."""
    runs.Run.read(run).save(run, state="failed")  # type: ignore[union-attr]
    event_log.write(run, "failed", reason="it was so")
    sidecar.end(process)
    assert process.returncode == 0


def told(run: Path) -> list[dict[str, Any]]:
    return [row for row in event_log.read_all(run) if row["kind"] == "alert"]


def lost(*nodes: int) -> list[str]:
    return [f"n{node} is lost: silent" for node in nodes]


def test_a_server_that_fails_and_recovers_gets_every_alert_once_and_in_order(run: Path, site: Site) -> None:
    site.plan = [500, (429, {"Retry-After": "1"}), "close", 503, 302]
    hand_over(run, webhook=site.address("json"), slack=site.address("slack"))
    process = begin(run)
    wait_for("the process looks", lambda: (run / "alerts.json").exists(), PATIENCE)
    for node in range(1, 7):
        lose(run, node)
        wait_for("each alert by itself", lambda: f"n{node} is lost" in (run / "alerts.json").read_text(), PATIENCE)  # noqa: B023
    wait_for("all have come", lambda: len(site.got.get("json", [])) == len(site.got.get("slack", [])) == 7, PATIENCE)
    end(run, process)
    started, *middle, failed = site.texts("json")
    assert started.startswith("started on 1 node ") and failed == "failed: it was so" and middle == lost(*range(1, 7))
    assert [text.splitlines()[0] for text in site.texts("slack")] == [
        f"*r*: {text}" for text in (started, *middle, failed)
    ]
    assert len({body["id"] for body in site.got["json"]}) == 8
    rows = told(run)
    assert [row["text"] for row in rows] == [started, *middle, failed]
    assert {name: one["outcome"] for row in rows for name, one in row["sinks"].items()} == {
        "webhook": "sent",
        "slack": "sent",
    }
    assert sum(one["tries"] for row in rows for one in row["sinks"].values()) == 16 + 5
    secret = [path.name for path in run.rglob("*") if path.is_file() and "s3cr3t" in path.read_text()]
    assert secret == ["config.yaml"] and "HTTP 500" in (run / "logs" / "driver.log").read_text()


@pytest.mark.long
def test_what_a_killed_process_had_not_sent_the_next_one_sends(run: Path) -> None:
    """With nobody at that port at first: connection refused."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    got = run.parents[2] / "got"
    hand_over(run, webhook=f"http://127.0.0.1:{port}{PATH}/json", command=["sh", "-c", f"cat >> {got}; echo >> {got}"])
    process = begin(run)
    lose(run, 1)
    wait_for("the other sink has them", lambda: got.exists() and "n1 is lost" in got.read_text(), PATIENCE)
    wait_for("it is remembered", lambda: (run / "alerts.json").read_text().count('"outcome": "sent"') == 2, PATIENCE)
    kill(process)
    lose(run, 2)
    late = Site(port)
    end(run, begin(run))
    late.shutdown()
    late.server_close()
    assert late.texts("json")[1:] == [*lost(1, 2), "failed: it was so"]
    assert [json.loads(line)["text"] for line in got.read_text().splitlines()] == late.texts("json")
    assert len(told(run)) == 4 and told(run)[0]["sinks"]["webhook"]["outcome"] == "sent"


@pytest.mark.long
@pytest.mark.parametrize("way", ["hang", "drip"])
def test_a_server_that_hangs_keeps_nobody_waiting(run: Path, site: Site, way: str) -> None:
    site.plan = [way] * 99
    other = Site()
    hand_over(run, webhook=site.address("json"), slack=other.address("slack"))
    process = begin(run, IMPATIENT)
    lose(run, 1)
    wait_for("the other sink has them", lambda: len(other.got.get("slack", [])) == 2, PATIENCE)
    wait_for(
        "it has timed out", lambda: "no response within 1 s" in (run / "logs" / "driver.log").read_text(), PATIENCE
    )
    end(run, process)
    assert [row["sinks"]["slack"]["outcome"] for row in told(run)] == ["sent"] * 3 and site.got == {}
    given_up = [row["sinks"]["webhook"]["outcome"] for row in told(run)]
    assert given_up[0] == "given up at the run's end: no response within 1 s" and len(given_up) == 3
    other.shutdown()
    other.server_close()


@pytest.mark.long
def test_between_two_drivers_nothing_is_given_up(run: Path, site: Site) -> None:
    """The end of a driver is not that of the run: its alerts wait for the next one, and rows are read once."""
    site.plan = [500] * 99
    hand_over(run, webhook=site.address("json"))
    process = begin(run, f"{QUICK}; sender.HANDOVER_LIMIT = 0.5")
    wait_for("it was tried", lambda: site.asked > 0, PATIENCE)
    sidecar.end(process)
    assert told(run) == [] and site.got == {}
    site.plan = []
    lose(run, 1)
    end(run, begin(run))
    assert site.texts("json")[1:] == [*lost(1), "failed: it was so"]


@pytest.mark.long
@pytest.mark.parametrize("why", [[], ["its cluster ended (signal SIGTERM)"]])
def test_a_driver_that_died_without_a_word_is_spoken_for(run: Path, site: Site, why: list[str]) -> None:
    """By the head: it has settled the run, or ends itself."""
    hand_over(run, webhook=site.address("json"))
    process = begin(run)
    wait_for("the start is told", lambda: len(told(run)) == 1, PATIENCE)
    wait_for("and remembered", lambda: files.read_json(run / "alerts.json")["outbox"] == [], PATIENCE)
    kill(process)
    record = runs.Run.read(run)
    assert record is not None
    if not why:
        assert runs.finalize(run, -9, record.id) == "failed"
    cluster = run.parents[1] / "clusters" / "main"

    async def speak() -> None:
        ignore: Any = None
        context = HeadContext(cluster, Cluster("main", "local", 1, "c", 0.0, 1, 1, 1), Config(), ignore, ignore, ignore)
        await Drivers(context, dict(os.environ)).send_alerts(run, 25.0, *why)

    asyncio.run(speak())
    assert [row["alert"] for row in told(run)] == ["started", "stopped" if why else "failed"]
    assert (why or ["the driver ended without a last word (signal 9)"])[0] in site.texts("json")[1]


def test_nothing_is_started_where_nobody_wants_to_know(run: Path) -> None:
    assert not Config().alerts.sinks
    hand_over(run)
    process = begin(run)
    assert process.wait(60) == 0 and told(run) == []
    kill(process)
