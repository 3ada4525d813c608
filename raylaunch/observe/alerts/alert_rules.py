"""The rules for alerts. Pure: rows from the files of a run and its cluster, and two clocks, in; alerts out.

    take(events, metrics, cluster)  alerts about new rows
    tick                            alerts about missing rows: no steps, no nodes; and about the end of the allocation
    close                           the cluster has ended, and the driver did not record the end of the run

`RuleState` is the only state between two calls. It is stored as JSON: the next process continues with it. Other
processes write the rows: a field that is missing or of another type gives a shorter text, not an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import hostlist

from raylaunch.config.schema import AlertKind, Config
from raylaunch.observe.alerts import baselines
from raylaunch.observe.alerts.alert import Alert, lasting, severity
from raylaunch.observe.history.timeline import is_step
from raylaunch.state.records import Record
from raylaunch.text import plural

Row = Mapping[str, Any]
FEW = 3
"""Up to this number of lost nodes get an alert each; more at once share one."""
SAME_END = 600.0
"""Seconds by which the reported end of an allocation may change without being a new allocation."""


@dataclass
class RuleState(Record):
    """What the rules know about a run. Unix times, by the clocks of the writers."""

    count: int = 0
    """Alerts so far."""
    begun: bool = False
    """The start of the run (or its restart) was reported."""
    over: bool = False
    attempt: int = 0
    running: bool = False
    """That attempt is running."""
    workers: int = 0
    step: int = 0
    loss: float | None = None
    reported: float | None = None
    """The attempt's last line of metrics."""
    gaps: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    spiking: bool = False
    committed: int | None = None
    """The last commit's step; None before the first."""
    late: bool = False
    stalled: bool = False
    trouble: float | None = None
    """The first fault since the last step."""
    cause: str = ""
    held: str = ""
    """Why it waits for nodes."""
    held_told: bool = False
    paused: float | None = None
    """When it was paused until another allocation."""
    end: float | None = None
    """Of the allocation."""
    end_was_far: bool = False
    end_told: bool = False


class Rules:
    """The rules of one run. `quiet` and `held_since` use the caller's clock (`now`): other clocks cause no alerts."""

    def __init__(self, config: Config, memory: RuleState, now: float) -> None:
        self._config, self._alerts, self.memory = config, config.alerts, memory
        self._quiet = self._held_since = now
        self._found: list[Alert] = []

    def take(self, events: Iterable[Row], metrics: Iterable[Row], cluster: Sequence[Row], now: float) -> list[Alert]:
        """The alerts in new rows; events first, since a step belongs to an attempt that has started."""
        for row in _usable(events):
            self._event(row, now)
        for row in metrics:
            if isinstance(row, Mapping):
                self._metrics(row, now)
        self._cluster(_usable(cluster))
        return self._taken()

    def tick(self, now: float, wall: float, end: float | None) -> list[Alert]:
        """The alerts about missing rows. `wall`: the time (Unix); `end`: the end of the allocation (Unix)."""
        m, own = self.memory, self._alerts
        limit = baselines.stall_limit(self._config, m.gaps, m.step)
        quiet = now - self._quiet
        if m.running and m.reported is not None and not m.stalled and limit is not None and quiet > limit:
            m.stalled = True
            self._add(
                "stalled", f"no step for {lasting(quiet)}, at step {m.step} (limit {lasting(limit)})", wall,
                facts={"step": m.step, "seconds": round(quiet, 1), "limit": round(limit, 1)},
            )  # fmt: skip
        held = now - self._held_since
        if m.held and not m.held_told and held >= own.below_min_after:
            m.held_told = True
            left = self._config.elastic.min_nodes_timeout - held
            text = f"waiting for nodes: {m.held}; saved, and fails in {lasting(left)} (elastic.min_nodes_timeout)"
            self._add("held", text, wall, facts={"step": m.step, "seconds": round(held, 1)})
        if end is not None and own.walltime_left and not m.over and m.paused is None:
            self._walltime(wall, end)
        return self._taken()

    def close(self, wall: float, why: str) -> list[Alert]:
        """There will be no more rows of this run. `why`: the reason, unless the rows contain one."""
        m = self.memory
        if not m.over and m.paused is None:
            m.over = True
            saved = f"the last checkpoint is step {m.committed}" if m.committed else "no checkpoint is known"
            text = f"stopped at step {m.step}: {_words(why)}, and the run could not save; {saved}"
            self._add("stopped", text, wall, facts={"step": m.step, "committed": m.committed, "reason": why})
        return self._taken()

    # -- a run's events --------------------------------------------------------------------------

    def _event(self, row: Row, now: float) -> None:
        m, moment = self.memory, row["time"]
        match row["kind"]:
            case "attempt_started":
                self._started(row, now)
            case "workers_connected" if self._config.trainer.script is not None:  # raylaunch does not see its steps
                self._recovered(moment, f"the script runs again on {m.workers} workers")
            case "attempt_ended":
                m.running = m.stalled = False
                m.step = _whole(row.get("step")) or m.step  # its last rows of metrics may not have been read yet
                if str(row.get("how")) in {"fault", "error"}:
                    self._trouble(moment, row.get("error") or row.get("cause") or row["how"])
            case "fault":
                m.running = False
                self._trouble(moment, row.get("reason") or row.get("cause") or "a fault")
                if row.get("cause") == "hardware":
                    node = str(row.get("node") or "")
                    text = f"{_words(row.get('reason'))} (rank {row.get('rank')} on {node or 'an unknown node'})"
                    self._add("gpu", text, moment, node, {"node": node, "rank": row.get("rank"), "step": m.step})
            case "decision" if row.get("decision") == "hold":
                m.held = f"{_words(row.get('reason'))} ({_words(row.get('setting'))})"
                m.held_told, self._held_since = False, now
            case "commit" if isinstance(row.get("step"), int):
                m.committed, m.late = row["step"], False
            case "paused":
                m.begun, m.held, m.paused = False, "", moment
                self._add("held", f"paused at step {m.step}: {_words(row.get('reason'))}", moment,
                          facts={"step": m.step}, mild=True)  # fmt: skip
            case "finished" | "stopped" | "failed" as kind:
                self._ended(kind, row)
            case _:
                self._of_checkpoints(row)

    def _of_checkpoints(self, row: Row) -> None:
        step, moment = row.get("step"), row["time"]
        facts = {"step": step}
        match row["kind"]:
            case "checkpoint_failed":
                self._add(
                    "checkpoint_failed", f"saving step {step} failed: {_words(row.get('error'))}; training continues",
                    moment, facts=facts,
                )  # fmt: skip
            case "checkpoint_invalid":
                text = f"the checkpoint of step {step} is damaged: {_words(row.get('file'))}: {_words(row.get('why'))}"
                self._add("checkpoint_failed", text, moment, facts=facts)
            case "export_failed":
                text = f"the run's weights could not be exported: {_words(row.get('reason'))}; see {_words(row.get('log'))}"
                self._add("checkpoint_failed", text, moment)
            case "checkpoint_slow":
                seconds = baselines.number(row.get("seconds")) or 0.0
                text = f"saving step {step} took {lasting(seconds)}, much longer than other saves"
                self._add("checkpoint_late", text, moment, facts={**facts, "seconds": seconds})
            case "nonfinite":
                text = (
                    f"step {step}: the {row.get('what')} is NaN or infinite (loss {row.get('loss')}, gradient "
                    f"norm {row.get('grad_norm')}); optimizer.on_nonfinite: {row.get('action')}"
                )
                self._add("nan", text, moment, facts=facts)

    def _started(self, row: Row, now: float) -> None:
        m = self.memory
        from_step = _whole(row.get("from_step"))
        m.attempt, m.running, m.reported, m.late, m.stalled = _whole(row.get("attempt")), True, None, False, False
        m.workers, m.held, self._quiet = _whole(row.get("workers")), "", now
        m.committed = from_step or None
        if m.begun:
            return
        nodes = plural(_whole(row.get("nodes")), "node")
        where = f"on {nodes} with {plural(m.workers, 'worker')} ({_hosts(row.get('on'))})"
        after = f", {lasting(row['time'] - m.paused)} after it was paused" if m.paused is not None else ""
        text = f"continued from step {from_step} {where}{after}" if from_step else f"started {where}"
        m.begun, m.paused, m.step = True, None, max(m.step, from_step)
        m.end, m.end_was_far, m.end_told = None, False, False
        self._add("started", text, row["time"], facts={"step": from_step, "workers": m.workers})

    def _trouble(self, moment: float, cause: Any) -> None:
        m = self.memory
        if m.trouble is None:
            m.trouble, m.cause = moment, _words(cause)

    def _recovered(self, moment: float, text: str) -> None:
        """The first progress after a fault, if there was one. (Rows of the failed attempt may be read after the fault
        itself: they are in another file.)"""
        m = self.memory
        if m.trouble is None or not m.running:
            return
        seconds = max(0.0, moment - m.trouble)
        self._add(
            "recovered", f"{text}, {lasting(seconds)} after the fault: {m.cause}", moment, ask="recovery",
            facts={"step": m.step, "workers": m.workers, "seconds": round(seconds, 1), "cause": m.cause},
        )  # fmt: skip
        m.trouble, m.cause = None, ""

    def _ended(self, kind: AlertKind, row: Row) -> None:
        m = self.memory
        m.over, m.running, m.held, m.trouble = True, False, "", None
        at = f" at step {m.step}" if m.step else ""
        reason = f": {_words(row.get('reason'))}" if kind != "finished" else ""
        facts = {"step": m.step, "loss": m.loss, "reason": _words(row.get("reason"))}
        self._add(
            kind, f"{kind}{at}{reason}", row["time"], facts=facts, ask="verdict" if kind == "failed" else "result"
        )

    # -- its metrics -----------------------------------------------------------------------------

    def _metrics(self, row: Row, now: float) -> None:
        m, step, moment = self.memory, row.get("step"), baselines.number(row.get("time"))
        if not isinstance(step, int) or moment is None or row.get("attempt") != m.attempt:
            return  # of a stale attempt, or not of a step
        if m.stalled:
            m.stalled = False
            text = f"continues at step {step}, after {lasting(now - self._quiet)} without metrics"
            self._add("recovered", text, moment, "stall", {"step": step})
        self._quiet = now
        for key in ("loss", "val_loss", "grad_norm"):
            value = baselines.number(row.get(key))
            if value is not None and not math.isfinite(value):
                self._add("nan", f"step {step}: {key} is {row[key]}", moment, facts={"step": step})
                break
        if not is_step(row):
            return
        if m.reported is not None and step > m.step:
            m.gaps = [*m.gaps, max(0.0, moment - m.reported)][-baselines.GAPS :]
        m.step, m.reported = step, moment
        self._recovered(moment, f"continues at step {step} with {m.workers} workers")
        loss = baselines.number(row["loss"])
        if loss is not None and math.isfinite(loss):
            self._judge_loss(step, loss, moment)
        self._judge_commits(step, moment)

    def _judge_loss(self, step: int, loss: float, moment: float) -> None:
        m = self.memory
        m.loss, m.losses = loss, [*m.losses, loss][-baselines.LOSSES :]
        found = baselines.spike(m.losses, self._alerts.loss_spike)
        if found is not None and not m.spiking:
            facts = {"step": step, "loss": found[0], "usual": found[1]}
            text = f"the loss rose to {found[0]:.4g} at step {step} (median before: {found[1]:.4g})"
            self._add("loss_spike", text, moment, facts=facts)
        m.spiking = found is not None

    def _judge_commits(self, step: int, moment: float) -> None:
        m, every = self.memory, self._config.step_scheduler.ckpt_every_steps
        if m.committed is None or m.late or step - m.committed <= self._alerts.checkpoint_late * every:
            return
        m.late = True
        text = f"no checkpoint since step {m.committed}, now at step {step}; expected every {every} steps"
        self._add("checkpoint_late", text, moment, facts={"step": step, "committed": m.committed})

    # -- its cluster's events --------------------------------------------------------------------

    def _cluster(self, rows: Sequence[Row]) -> None:
        m = self.memory
        gone = {str(row.get("node")): row for row in rows if row["kind"] in {"node_lost", "node_failed"}}
        if len(gone) > FEW:
            text, moment = f"{len(gone)} nodes are lost: {_hosts(gone)}", max(row["time"] for row in gone.values())
            self._add("node_lost", text, moment, facts={"nodes": [*gone], "step": m.step})
        else:
            for node, row in gone.items():
                what = "is lost" if row["kind"] == "node_lost" else "cannot be used"
                text = f"{node} {what}: {_words(row.get('reason') or row.get('error'))}"
                self._add("node_lost", text, row["time"], node, {"node": node, "step": m.step})
        for row in rows:
            match row["kind"]:
                case "gpu_trouble":
                    node = str(row.get("node"))
                    text = f"GPU trouble on {node}: {_words(row.get('what'))}"
                    self._add("gpu", text, row["time"], node, {"node": node, "what": row.get("what"), "step": m.step})
                case "termination_notice" if row.get("why") == "preempted" or not m.end_told:
                    m.end_told = True
                    left = baselines.number(row.get("seconds_left"))
                    time_left = f"in {lasting(left)}" if left is not None else "soon"
                    why = "preempted" if row.get("why") == "preempted" else "time limit"
                    self._add("walltime", f"{why}: the allocation ends {time_left}; {self._onward()}", row["time"],
                              facts={"step": m.step, "seconds": left, "why": row.get("why")})  # fmt: skip

    def _walltime(self, wall: float, end: float) -> None:
        m, most = self.memory, self._alerts.walltime_left
        if m.end is None or abs(end - m.end) > SAME_END:
            m.end_was_far = m.end_told = False
        m.end, left = end, end - wall
        if left > most:
            m.end_was_far = True
            return
        eta = self._eta()
        if not m.end_was_far or m.end_told or (eta is not None and eta < 0.9 * left):
            return
        m.end_told = True
        needs = f" (about {lasting(eta)} of training remain)" if eta is not None else ""
        text = f"the allocation ends in {lasting(left)}{needs}; {self._onward()}"
        self._add("walltime", text, wall, facts={"step": m.step, "seconds": round(left), "needs": eta and round(eta)})

    def _eta(self) -> float | None:
        """Seconds to the last step at the median step time; None while that is unknown."""
        m = self.memory
        limit = baselines.usual(m.gaps)
        every = self._config.logging.log_every_steps
        return None if limit is None else limit / every * max(0, self._config.step_scheduler.max_steps - m.step)

    def _onward(self) -> str:
        requeues = self._config.elastic.max_requeues
        onward = "continues in another one" if requeues else "stops (elastic.max_requeues: 0)"
        return f"the run saves and {onward}"

    # -- what was found --------------------------------------------------------------------------

    def _add(
        self,
        kind: AlertKind,
        text: str,
        moment: float,
        subject: str = "",
        facts: Mapping[str, Any] | None = None,
        ask: Any = "",
        mild: bool = False,
    ) -> None:
        how = "warning" if mild else severity(kind)
        self._found.append(Alert(kind, text, subject, moment, how, facts or {}, ask))

    def _taken(self) -> list[Alert]:
        """The new alerts of the configured kinds, in order of time, each with its number."""
        found, self._found = [alert for alert in self._found if alert.kind in self._alerts.kinds], []
        found.sort(key=lambda alert: alert.time)
        first = self.memory.count + 1
        self.memory.count += len(found)
        return [replace(alert, id=str(first + n)) for n, alert in enumerate(found)]


def _usable(rows: Iterable[Row]) -> list[Row]:
    return [
        {**row, "time": moment}
        for row in rows
        if isinstance(row, Mapping) and isinstance(row.get("kind"), str)
        and (moment := baselines.number(row.get("time"))) is not None
    ]  # fmt: skip


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _words(value: Any, most: int = 300) -> str:
    """A text from another program, as one line."""
    text = " ".join(str(value if value is not None else "").split())
    return text if len(text) <= most else f"{text[:most]}…"


def _hosts(names: Any) -> str:
    """`gpu[1-4,7]`, as Slurm writes it."""
    try:
        return _words(hostlist.collect_hostlist([str(name) for name in names]))
    except (TypeError, hostlist.BadHostlist):
        return _words(names)
