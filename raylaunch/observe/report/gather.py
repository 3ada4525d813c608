"""All facts of a report, gathered once: a run directory, its clusters' directories, one `sacct` → Facts.

If something is missing, damaged or of an older version, its part is empty, with a line in `unknown`; the content of a
file never raises an error. The page, the text and `--json` are made from these facts only.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylaunch import __version__
from raylaunch.cluster import up
from raylaunch.config import loader
from raylaunch.config.schema import CostConfig, SlurmConfig
from raylaunch.errors import RaylaunchError
from raylaunch.observe.history import goodput, node_hours, recoveries, safe_read
from raylaunch.observe.history.goodput import Ledger, Stretch
from raylaunch.observe.history.recoveries import Recovery
from raylaunch.observe.history.timeline import FINAL, History, Row, read, settled
from raylaunch.observe.report import cost as costs
from raylaunch.observe.report import curves, settings
from raylaunch.observe.report.axis import Axis
from raylaunch.observe.report.cost import Cost
from raylaunch.observe.report.curves import Curves, Series
from raylaunch.observe.report.nodes import NodeFact, of_events
from raylaunch.scheduler.slurm import batch_script
from raylaunch.scheduler.slurm.client import Slurm
from raylaunch.state import files, provenance, records
from raylaunch.state.runs import Run

LOAD_FILE = "load.jsonl"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass
class ReportData:
    """One run. Times in seconds since the epoch, durations in seconds."""

    name: str
    state: str
    """As in run.json, or interrupted (the cluster ended before the run did), or unknown."""
    reason: str
    cluster: str
    directory: Path
    began: float
    until: float
    """Its end, or now, or its last activity."""
    live: bool
    axis: Axis
    history: History
    book: Ledger
    stretches: list[Stretch]
    curves: Curves
    load: dict[str, Series]
    injected: dict[int, str]
    nodes: list[NodeFact]
    cost: Cost
    config: dict[str, Any] | None
    hand_overs: list[dict[str, Any]]
    gpus: dict[str, int]
    """Node → number of GPUs; empty if unknown."""
    gpu_type: str
    """Its name in Slurm, or ""."""
    parameters: int | None = None
    unknown: list[str] = field(default_factory=list)
    """Missing information, one line each."""
    made: float = field(default_factory=time.time)
    version: str = __version__

    def named(self, recovery: Recovery) -> str:
        """A short name of the recovery."""
        return recoveries.named(recovery, self.injected)

    @property
    def faults(self) -> list[Recovery]:
        """Recoveries other than resizes."""
        return [r for r in self.book.recoveries if r.kind != "resize"]

    @property
    def survived(self) -> list[Recovery]:
        """Faults after which the run reached a step."""
        return [r for r in self.faults if r.total is not None]

    @property
    def max_steps(self) -> int | None:
        found = settings.at(self.config, "step_scheduler.max_steps")
        script = settings.at(self.config, "trainer.script")
        return found if isinstance(found, int) and script is None else None

    @property
    def tokens(self) -> int | None:
        found = self.curves.last.get("tokens")
        return found if isinstance(found, int) else None

    @property
    def loss(self) -> float | None:
        """Of the last step; None: it has none, or it is NaN or infinite."""
        return curves.number(self.curves.last.get("loss"))

    @property
    def rate(self) -> tuple[str, float] | None:
        """(tokens or samples, number per second of step time)."""
        for name in curves.RATES:
            mean = self.curves.series[name].mean_rate
            if mean is not None:
                return name.removesuffix("_per_s"), mean
        return None

    @property
    def most_workers(self) -> int:
        return max((a.workers for a in self.history.attempts), default=0)

    @property
    def most_nodes(self) -> int:
        return max((len(a.nodes) for a in self.history.attempts), default=0)


def gather(run_dir: Path, slurm: Slurm | None = None, now: float | None = None) -> ReportData:
    """All facts of a run; `slurm`: for accounting and the state of its cluster (None: the real Slurm)."""
    now = time.time() if now is None else now
    record, why = safe_read.run(run_dir)
    events = _events(run_dir)
    span = _span(run_dir, record, events, now)
    name, until = span.cluster, span.until
    axis = Axis(span.intervals)
    found = curves.metrics(run_dir / files.METRICS_FILE, axis)
    of_cluster = {one: _cluster_events(run_dir, one) for one in _clusters(events, name)}
    begun = axis.intervals[0][0]
    history = read(events, found.steps, [r for r in of_cluster.get(name, []) if r["time"] >= begun])
    end = now if span.live else None
    config = settings.read(run_dir / records.CONFIG_FILE)
    load: dict[str, Series] = {}
    meters = sum(curves.load(_cluster_dir(run_dir, one) / LOAD_FILE, axis, load) for one in of_cluster)
    asked = [settings.read(_cluster_dir(run_dir, name) / records.CONFIG_FILE), config]
    gpus = _gpus(run_dir, of_cluster, asked)
    where = _where(events, until)
    lives = {one: node_hours.lives(of_cluster[one], until) for one in where}
    held = [(lives[one][1], spans) for one, spans in where.items()]
    cost = costs.of_run(held, history.attempts, gpus, settings.prices(config, _site_prices()), until)
    jobs = _jobs({one: found_lives for one, (found_lives, _) in lives.items()}, where)
    if jobs:
        costs.ask_accounting(cost, list(jobs), min(jobs.values()), slurm or Slurm())
    if cost.joules is None and meters > 0:
        cost.joules, cost.energy_from = meters, "meters"
    hand_overs = provenance.read(run_dir)
    unknown = {
        f"state: {why}": record is None,
        "configuration: config.yaml is missing or cannot be read": config is None,
        f"energy and efficiency: {cost.unknown}": bool(cost.unknown),
        "nodes and node-hours: the events of the cluster are missing": not any(of_cluster.values()),
        "utilisation: not recorded by the cluster": not load,
        "loss and throughput: the run has no metrics": not found.lines,
        "versions and state of the code: not recorded at the submission": not hand_overs,
    }
    node_rows = [r for one, spans in where.items() for r in of_cluster.get(one, []) if _inside(r["time"], spans)]
    seconds = node_hours.node_seconds([h for holds, _ in held for h in holds], axis.intervals)
    built = [e["parameters"] for e in events if e["kind"] == "model_built" and isinstance(e.get("parameters"), int)]
    injected = [e for e in events if e["kind"] == "fault_injected" and isinstance(e.get("seq"), int)]
    return ReportData(
        name=run_dir.name, state=_state(record, span.live), reason=record.reason if record is not None else "",
        cluster=name, directory=run_dir, began=span.began, until=until, live=span.live, axis=axis, history=history,
        book=goodput.compute(history, end), stretches=goodput.stretches(history, end), curves=found, load=load,
        injected={int(e["seq"]): str(e.get("fault")) for e in injected},
        nodes=of_events(node_rows, seconds, history, safe_read.members(_cluster_dir(run_dir, name)), gpus),
        cost=cost, config=config, hand_overs=hand_overs, gpus=gpus,
        gpu_type=_gpu_type(asked) or cost.gpu_type.upper(), parameters=built[-1] if built else None,
        unknown=[text for text, is_so in unknown.items() if is_so], made=now,
    )  # fmt: skip


@dataclass(frozen=True)
class _Span:
    """When and where a run was active. `began`: its first start, or its submission if it never started."""

    cluster: str
    live: bool
    began: float
    until: float
    intervals: list[tuple[float, float]]


def _span(run_dir: Path, record: Run | None, events: Sequence[Mapping[str, Any]], now: float) -> _Span:
    last = curves.number(safe_read.last_metrics(run_dir).get("time"))
    signs = [e["time"] for e in events[-1:]] + ([last] if last is not None else [])
    name = record.cluster if record is not None else str(next((e["cluster"] for e in events if "cluster" in e), ""))
    live = record is not None and record.state not in FINAL and _lives(run_dir, name, max(signs, default=now))
    until = now if live else max((t for t in signs if t <= now), default=now)
    intervals = node_hours.active(events, until)
    if not intervals and last is not None:  # no events: what the metrics span
        intervals = [(_first_time(run_dir, until), until)]
    created = record.created if record is not None else now
    return _Span(name, live, intervals[0][0] if intervals else created, until, intervals)


def _state(record: Run | None, live: bool) -> str:
    if record is None:
        return "unknown"
    return record.state if live or record.state in FINAL else "interrupted"


def _lives(run_dir: Path, name: str, last: float) -> bool:
    """Whether the cluster of a run that has not ended is running; assumed if Slurm does not respond."""
    directory = _cluster_dir(run_dir, name)
    record, _ = safe_read.cluster(directory)
    if record is None or (directory / records.ENDED_FILE).exists() or record.created > last:
        return False
    try:
        return up.alive_job(directory, record) is not None
    except (RaylaunchError, OSError, TypeError, KeyError):
        return True


def _events(directory: Path) -> list[Row]:
    """In order of time."""
    rows = map(safe_read.sound, map(curves.parse, curves.lines(directory / files.EVENTS_FILE)))
    return list(settled(row for row in rows if row is not None))


def _cluster_dir(run_dir: Path, name: str) -> Path:
    return files.cluster_dir(run_dir.parent.parent, name if _NAME.fullmatch(name) else ".")


def _cluster_events(run_dir: Path, name: str) -> list[Row]:
    return _events(_cluster_dir(run_dir, name))


def _clusters(events: Sequence[Row], name: str) -> list[str]:
    """The clusters to which the run was submitted, the last one last."""
    return list(dict.fromkeys([*(str(e["cluster"]) for e in events if e["kind"] == "queued" and "cluster" in e), name]))


def _where(events: Sequence[Row], until: float) -> dict[str, list[node_hours.Interval]]:
    """Cluster → the run's time on it."""
    found: dict[str, list[node_hours.Interval]] = {}
    now: tuple[str, float] | None = None
    for row in events:
        if row["kind"] in FINAL or (row["kind"] == "queued" and "cluster" in row):
            if now is not None:
                found.setdefault(now[0], []).append((now[1], row["time"]))
            now = (str(row["cluster"]), row["time"]) if row["kind"] == "queued" else None
    if now is not None:
        found.setdefault(now[0], []).append((now[1], max(now[1], until)))
    return found


def _jobs(lives: dict[str, list[node_hours.Life]], where: dict[str, list[node_hours.Interval]]) -> dict[str, float]:
    """Slurm's jobs of the lives that the run was in → when the life began."""
    return {
        job: life.began
        for name, spans in where.items()
        for life in lives[name]
        if node_hours.overlap(life.began, max(life.last, life.began + 1.0), spans) > 0
        for job in life.jobs
        if job.isdigit()
    }


def _inside(moment: float, spans: Sequence[node_hours.Interval]) -> bool:
    """Within the run's time, or in the bring-up just before it."""
    return any(low - 600.0 <= moment <= high for low, high in spans)


def _first_time(run_dir: Path, until: float) -> float:
    for line in curves.lines(run_dir / files.METRICS_FILE):
        moment = curves.number((curves.parse(line) or {}).get("time"))
        if moment is not None and moment < until:
            return moment
    return until - 1.0


def _gpus(run_dir: Path, clusters: dict[str, list[Row]], asked: Sequence[dict[str, Any] | None]) -> dict[str, int]:
    """Node → number of GPUs: as the agents reported; if no longer known, as requested."""
    found: dict[str, int] = {}
    for name in clusters:
        found |= safe_read.gpus(_cluster_dir(run_dir, name))
    count = 0 if found else max(map(batch_script.gpus_per_node, map(_gpus_asked, asked)))
    nodes = (str(r.get("node")) for rows in clusters.values() for r in rows if r["kind"] == "node_joined")
    return found or (dict.fromkeys(nodes, count) if count else {})


def _gpu_type(asked: Sequence[dict[str, Any] | None]) -> str:
    """The H100 of `h100:8`, or of `gpu:h100:8`."""
    for slurm in map(_gpus_asked, asked):
        gres = [part for part in (slurm.gres or "").split(",") if part.startswith("gpu")]
        for part in (str(slurm.gpus_per_node or ""), *gres):
            words = [word for word in part.split("(")[0].split(":") if word and not word.isdigit() and word != "gpu"]
            if words:
                return words[0].upper()
    return ""


def _gpus_asked(config: dict[str, Any] | None) -> SlurmConfig:
    """The GPU settings of a configuration, also if other parts are invalid."""
    of_node, gres = settings.at(config, "slurm.gpus_per_node"), settings.at(config, "slurm.gres")
    return SlurmConfig.model_construct(
        gpus_per_node=of_node if isinstance(of_node, (str, int)) else None, gres=gres if isinstance(gres, str) else None
    )


def _site_prices() -> CostConfig:
    with contextlib.suppress(RaylaunchError):
        return loader.load(None).cost
    return CostConfig()
