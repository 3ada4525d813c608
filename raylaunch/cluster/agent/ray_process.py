"""One Ray node under an agent: its command line, its environment, its start, its own words on failure.

The arguments leave nothing to Ray's guessing: address, every port, CPUs, memory, object store, GPUs,
temp directory. The process comes from `ray_start`, made early so that its imports overlap with
waiting. Ending it is `processes.end_tree`, never `ray stop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raylaunch.host.network import interface_of
from raylaunch.host.ports import Ports
from raylaunch.host.resources import Resources
from raylaunch.state.appender import LOG_ROOM, Appender
from raylaunch.state.records import WORKER_RESOURCE

STARTED = "Ray runtime started"
_TAIL = 16384
"""Bytes at the end of a log in which the reason of an end is looked for."""

# Ray's defaults find a dead node after 15 s or more. A second of silence, thrice, is quick without
# false deaths on a loaded machine (half of it was not).
_HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass(frozen=True)
class RayStart:
    """What Ray needs to know about this node. `head` is the GCS's address, None on the head itself."""

    node: str
    address: str
    ports: Ports
    resources: Resources
    temp_dir: Path
    workers: int
    head: str | None

    def arguments(self) -> list[str]:
        """The arguments after `ray`."""
        low, high = self.ports.workers
        options: dict[str, object] = {
            "node-ip-address": self.address,
            "node-name": self.node,
            "num-cpus": self.resources.cpus,
            "num-gpus": len(self.resources.gpus),
            "memory": self.resources.memory,
            "object-store-memory": self.resources.object_store,
            "resources": json.dumps({WORKER_RESOURCE: self.workers}),
            "temp-dir": self.temp_dir / "r",
            "node-manager-port": self.ports.node_manager,
            "object-manager-port": self.ports.object_manager,
            "dashboard-agent-listen-port": self.ports.dashboard_agent,
            "dashboard-agent-grpc-port": self.ports.metrics_agent,
            "runtime-env-agent-port": self.ports.runtime_env_agent,
            "metrics-export-port": self.ports.metrics_export,
            "min-worker-port": low,
            "max-worker-port": high,
            # Workers write their own logs into the run directory: nothing to forward.
            "include-log-monitor": "false",
        }
        if self.head is None:
            options |= {
                "port": self.ports.gcs,
                "dashboard-host": "127.0.0.1",
                "dashboard-port": self.ports.dashboard,
            }
            # --no-monitor: Ray's autoscaler has nothing to scale here.
            mode = ["--head", "--no-monitor", "--include-dashboard=true"]
        else:
            mode = [f"--address={self.head}"]
        return ["start", "--block", "--disable-usage-stats", *mode, *(f"--{k}={v}" for k, v in options.items())]


def environment(
    base: Mapping[str, str], token_file: Path, temp_dir: Path, address: str, ports: Ports, cpus_per_worker: int
) -> dict[str, str]:
    """The environment of everything Ray on this node. The token stays in its file."""
    fixed = {
        "TMPDIR": str(temp_dir / "tmp"),  # torch and multiprocessing leave files there, too
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),  # else one fixed port for all heads of a node
        # Ray watches the whole machine's memory, which on a shared node is mostly other people's;
        # the job's cgroup is the judge of ours.
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's Train page
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon the driver hears of a dead worker
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # a thousand cold imports from one file system
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line twice
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # notices come through the agents
        "PYTHONUNBUFFERED": "1",
        **_HEALTH,
    }
    defaults = {"OMP_NUM_THREADS": str(cpus_per_worker)}
    interface = interface_of(address)
    if interface is not None:
        # gloo would resolve the host name, which Debian maps to 127.0.1.1.
        defaults["GLOO_SOCKET_IFNAME"] = interface
    kept = {k: v for k, v in base.items() if k not in {"RAY_ADDRESS", "RAY_AUTH_TOKEN"}}
    return {**defaults, **kept, **fixed}


class RayProcess:
    """`ray start --block` as a child: made early, begun when the head is known, heard while it runs.

    `log` is on shared storage, and we run in the event loop that answers pings: what Ray prints is read here and
    written in a thread (see `appender`).
    """

    def __init__(self, process: Process, log: Path) -> None:
        self._process, self._log = process, Appender(log, LOG_ROOM, is_log=True)
        self._log.start()
        self._said = b""
        """The end of what it printed."""
        self.started = asyncio.Event()
        self._pump = asyncio.create_task(self._copy())

    @classmethod
    async def prepare(cls, env: Mapping[str, str], log: Path) -> RayProcess:
        """Start the process that will be Ray's, so that it imports; `begin` tells it what to do."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "raylaunch.cluster.agent.ray_start",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=dict(env), start_new_session=True,
        )  # fmt: skip
        return cls(process, log)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def begin(self, node: RayStart) -> None:
        """Hand the arguments over."""
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it has ended already: whoever waits for it finds out
            self._process.stdin.write(json.dumps(node.arguments()).encode() + b"\n")
            await self._process.stdin.drain()

    def start_dashboard(self) -> None:
        """Let the head start what it put off (see `ray_start.lighten`)."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"dashboard\n")

    async def exited(self) -> int:
        """Wait for its end; the exit status (negative: the signal)."""
        await asyncio.shield(self._pump)  # whoever gives up waiting does not stop the copying
        return await self._process.wait()

    async def own_words(self, temp_dir: Path, most: int = 3) -> str:
        """Why Ray ended, in its own logs' words: the last telling lines."""
        logs = await asyncio.to_thread(_session_logs, temp_dir)
        found: list[str] = []
        for lines in (*logs, self._said.decode(errors="replace").splitlines()):
            found += [line for line in lines if _TROUBLE.search(line) and not _NOISE.search(line)][-most:]
        return " | ".join(dict.fromkeys(line.strip()[:400] for line in found[-most:])) or "Ray said nothing"

    async def _copy(self) -> None:
        """Copy what it prints to the node's log, and notice the line that says it has started."""
        assert self._process.stdout is not None
        try:
            while chunk := await self._process.stdout.read(1 << 16):
                self._log.write(chunk)
                if STARTED.encode() in self._said[-len(STARTED) :] + chunk:  # it may be cut in two
                    self.started.set()
                self._said = (self._said + chunk)[-_TAIL:]
        finally:
            self._log.end()


_TROUBLE = re.compile(r"(error|exception|fail|unable|refused|denied|in use|no space|not found|check failed)", re.I)
_NOISE = re.compile(
    r"(state-dump|error_type|Failed to get (node|cluster) info|metrics agent|FutureWarning|fail_on|event_stats)"
)


def _session_logs(temp_dir: Path) -> list[list[str]]:
    """The last lines of each log that tells why Ray's processes end."""
    logs = temp_dir / "r" / "session_latest" / "logs"
    names = ("gcs_server.out", "gcs_server.err", "dashboard.err", "raylet.out", "raylet.err")
    return [_last_lines(logs / name) for name in names]


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as source:
            source.seek(max(0, os.fstat(source.fileno()).st_size - _TAIL))
            return source.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def described(status: int) -> str:
    """An exit status for people: the signal's name for a negative one."""
    return signal.Signals(-status).name if status < 0 else f"exit code {status}"
