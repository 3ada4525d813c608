"""The files of a cluster and its run → metric families, in Prometheus's naming (base units, `_total` for counters).

Readers keep their position in the growing files: a scrape reads only new lines. Files that cannot be read are omitted
from that scrape.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from raylaunch.cluster.telemetry import collect
from raylaunch.config import loader
from raylaunch.host.internal_errors import InternalErrors
from raylaunch.observe.history import goodput
from raylaunch.state import event_log, members, records, runs
from raylaunch.state.cluster_events import InternalError
from raylaunch.state.event_log import EventReader
from raylaunch.state.head_state import HeadState
from raylaunch.state.records import Cluster, Head
from raylaunch.state.runs import Run

LEDGER_EVERY = 60.0
"""Seconds for which a ledger is cached: it takes longer than the rest."""
NODE = {
    "cpu": ("raylaunch_node_cpu_ratio", "CPU usage of the job on the node, relative to its allocation"),
    "memory": ("raylaunch_node_memory_ratio", "Memory usage of the job on the node, relative to its allocation"),
    "gpu": ("raylaunch_node_gpu_ratio", "Mean utilisation of the GPUs"),
    "gpu_memory": ("raylaunch_node_gpu_memory_ratio", "Mean memory usage of the GPUs"),
    "watts": ("raylaunch_node_gpu_power_watts", "Power draw of the GPUs"),
    "temperature": ("raylaunch_node_gpu_temperature_celsius", "Temperature of the hottest GPU"),
    "oom_kills": ("raylaunch_node_oom_kills_total", "Processes of the job that the kernel killed for lack of memory"),
    "ecc_errors": ("raylaunch_node_gpu_ecc_errors_total", "Uncorrected ECC errors of the GPUs"),
}
STEP = {
    "step": ("raylaunch_run_step", "Number of the last step"),
    "loss": ("raylaunch_run_loss", "Training loss of the last step"),
    "lr": ("raylaunch_run_learning_rate", "Learning rate of the last step"),
    "grad_norm": ("raylaunch_run_gradient_norm", "Norm of the gradient of the last step"),
    "tokens": ("raylaunch_run_tokens", "Tokens trained on; decreases when a recovery repeats steps"),
    "tokens_per_s": ("raylaunch_run_tokens_per_second", "Tokens per second of the last step"),
    "data_wait": ("raylaunch_run_data_wait_seconds", "Seconds that the last step waited for data"),
    "world_size": ("raylaunch_run_world_size", "Number of workers in the last step"),
    "time": ("raylaunch_run_last_step_timestamp_seconds", "Time of the last step"),
}


class _Events:
    """The number of events by kind, and the last commit."""

    def __init__(self, directory: Path) -> None:
        self._reader = EventReader(directory)
        self.counts: Counter[str] = Counter()
        self.commit: dict[str, Any] = {}

    def read(self) -> _Events:
        for row in self._reader.read():
            self.counts[str(row.get("kind"))] += 1
            if row.get("kind") == "commit":
                self.commit = row
        return self


class ClusterCollector:
    """The metrics of one cluster; the registry of prometheus_client calls `collect`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._errors = InternalErrors(lambda work, error: event_log.append(directory, InternalError(work, error)))
        self._events = _Events(directory)
        self._run = ""
        self._run_events = _Events(directory)
        self._ledger: tuple[float, dict[str, Any]] = (-LEDGER_EVERY, {})

    def collect(self) -> Iterator[Metric]:
        """All metric families that can currently be read."""
        cluster = Cluster.read(self._directory)
        if cluster is None:
            return
        memory = HeadState.read(self._directory, cluster)
        for part in (self._of_cluster(cluster, memory), self._of_nodes(cluster), self._of_run(cluster, memory)):
            with self._errors.caught(f"metrics ({part.__name__})"):  # type: ignore[attr-defined]
                yield from part

    def _of_cluster(self, cluster: Cluster, memory: HeadState) -> Iterator[Metric]:
        labels = {"cluster": cluster.name}
        head = Head.read(self._directory)
        yield _one(
            "raylaunch_cluster_incarnation", "Incremented by each election of a head", labels, head and head.incarnation
        )
        yield _one("raylaunch_cluster_nodes_wanted", "Nodes that the cluster should have", labels, memory.wanted)
        states = Counter(row.state for row in members.living(self._directory, cluster).nodes)
        family = GaugeMetricFamily("raylaunch_cluster_nodes", "Nodes by state", labels=["cluster", "state"])
        for name in sorted({"ready", "lost", *states}):
            family.add_metric([cluster.name, name], states[name])
        yield family
        strikes = GaugeMetricFamily(
            "raylaunch_node_strikes", "Number of losses and failures of the node", labels=["cluster", "node"]
        )
        for node, count in memory.strikes.items():
            strikes.add_metric([cluster.name, node], count)
        yield strikes
        yield _counts("raylaunch_cluster_events_total", "Events of the cluster", labels, self._events.read().counts)

    def _of_nodes(self, cluster: Cluster) -> Iterator[Metric]:
        loads = collect.latest(self._directory, cluster.canary)
        for key, (name, text) in NODE.items():
            family = _family(name, text, ["cluster", "node"])
            for node, row in loads.items():
                if key in row:
                    family.add_metric([cluster.name, node], float(row[key]))
            yield family

    def _of_run(self, cluster: Cluster, memory: HeadState) -> Iterator[Metric]:
        name = memory.running or self._run
        if not name:
            return
        directory = runs.directory(self._directory, name)
        if name != self._run:
            self._run, self._run_events, self._ledger = name, _Events(directory), (-LEDGER_EVERY, {})
        labels = {"cluster": cluster.name, "run": name}
        record = Run.read(directory)
        if record is None:
            return
        yield _one(
            "raylaunch_run_up", "1 while the run is active, 0 after its end", labels, record.state not in runs.FINAL
        )
        yield _one("raylaunch_run_attempts_total", "Attempts started", labels, record.attempt)
        config = loader.load_resolved(directory / records.CONFIG_FILE)
        yield _one("raylaunch_run_max_steps", "Configured number of steps", labels, config.step_scheduler.max_steps)
        last = runs.last_metrics(directory)
        for key, (metric, text) in STEP.items():
            if isinstance(last.get(key), (int, float)):
                yield _one(metric, text, labels, last[key])
        events = self._run_events.read()
        yield _counts("raylaunch_run_events_total", "Events of the run", labels, events.counts)
        if events.commit:
            yield _one("raylaunch_run_last_commit_step", "Step of the last checkpoint", labels, events.commit["step"])
            yield _one(
                "raylaunch_run_last_commit_timestamp_seconds",
                "Time of the last checkpoint",
                labels,
                events.commit["time"],
            )
        found = self._summary(directory)
        yield _one("raylaunch_run_goodput_ratio", "Productive time over total time", labels, found.get("goodput"))
        yield _one("raylaunch_run_steps_lost_total", "Steps repeated after faults", labels, found.get("steps_lost"))
        yield _one("raylaunch_run_recoveries_total", "Recoveries from faults", labels, found.get("recoveries"))

    def _summary(self, directory: Path) -> dict[str, Any]:
        at, found = self._ledger
        if time.monotonic() - at > LEDGER_EVERY:
            found = goodput.summary(directory)
            self._ledger = time.monotonic(), found
        return found


def _family(name: str, text: str, labels: list[str]) -> Any:
    if name.endswith("_total"):
        return CounterMetricFamily(name, text, labels=labels)
    return GaugeMetricFamily(name, text, labels=labels)


def _one(name: str, text: str, labels: dict[str, str], value: Any) -> Metric:
    """A family with one metric; empty if the value is unknown."""
    family = _family(name, text, list(labels))
    if value is not None:
        family.add_metric(list(labels.values()), float(value))
    assert isinstance(family, Metric)
    return family


def _counts(name: str, text: str, labels: dict[str, str], counts: Counter[str]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[*labels, "kind"])
    for kind, count in sorted(counts.items()):
        family.add_metric([*labels.values(), kind], count)
    return family
