"""The process next to a run's driver that reads its files as they grow, and sends alerts.

    rows → rules → details → limits → outbox → one task per sink: send, retry, give up → an event "alert"

    python -m raylaunch.observe.alerts.sender RUN_DIR [WHY]     ends soon after its stdin; WHY: the run ends with it

The position in the files, held alerts and pending alerts are stored in RUN_DIR/alerts.json before anything is sent: the
next process, after a fault or in another allocation, continues from there. An alert is delivered at least once (with
the same id), in order at each sink; a sink that hangs delays neither the others nor the end of the run. No address
leaves this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.errors import StateError, first_line
from raylaunch.host import processes
from raylaunch.observe.alerts import alert_sinks, details, outbox
from raylaunch.observe.alerts.alert import Alert, message
from raylaunch.observe.alerts.alert_rules import Rules, RuleState
from raylaunch.observe.alerts.outbox import Outbox, PendingAlert
from raylaunch.observe.alerts.rate_limit import Limiter
from raylaunch.state import event_log, files, records, runs
from raylaunch.state.event_log import EventReader
from raylaunch.state.run_events import AlertSent
from raylaunch.state.runs import Run
from raylaunch.timing import LAST_LIMIT
from raylaunch.training.cluster_view import ClusterView

MEMORY = "alerts.json"
PAUSE = 1.0
"""Seconds between two reads of the files."""
REMEMBER_EVERY = 60.0
"""Seconds between two writes of the position while nothing is to be sent."""
DETAILS_LIMIT = 5.0
"""Seconds for the details of all alerts of one read."""
HANDOVER_LIMIT = 3.0
"""Seconds that the end of a driver waits for sinks. (LAST_LIMIT: the same at the end of the run, the last chance.)"""


class AlertSender:
    """The alerts of one run, during the life of one driver."""

    def __init__(self, run_dir: Path, config: Config, run: Run) -> None:
        self._run_dir, self._config, self._run = run_dir, config, run
        self._cluster_dir = files.cluster_dir(run_dir.parents[1], run.cluster)
        incarnation = os.environ.get("RAYLAUNCH_INCARNATION")
        self._roster = ClusterView(self._cluster_dir, int(incarnation)) if incarnation else None
        self._sinks = config.alerts.sinks
        self._events = EventReader(run_dir, at_end=True)
        self._metrics = files.LineReader(run_dir / files.METRICS_FILE, at_end=True)
        self._cluster = EventReader(self._cluster_dir, at_end=True)
        self._outbox, self._limiter = Outbox(), Limiter(config.alerts.min_interval, config.alerts.max_per_hour)
        self._rules = Rules(config, self._recall(), time.monotonic())
        self._known = self._snapshot()
        self._news = {name: asyncio.Event() for name in self._sinks}
        self._ending = asyncio.Event()
        self._writing = asyncio.Lock()
        self._remembered = 0.0
        self._complaint = ""

    # -- what is remembered ----------------------------------------------------------------------

    def _recall(self) -> RuleState:
        """Continue where the previous process stopped; else from the last submission of the run."""
        readers, losses = self._readers(), list[float]()
        try:
            known = files.read_json(self._run_dir / MEMORY) or {}
            if known:
                self._limiter.recall(known["limits"])
                self._outbox = Outbox(known["outbox"])
            if known.get("run") == self._run.id:
                for name, reader in readers.items():
                    reader.offset = int(known["offsets"][name])
                return RuleState.parse(known["memory"])
            if known:  # submitted again: its usual loss has not changed
                losses = RuleState.parse(known["memory"]).losses
        except (StateError, KeyError, TypeError, ValueError, AttributeError) as error:
            _say(f"{MEMORY} cannot be used: {first_line(error)}")
        handed = _last_line(self._events.path, "queued")
        begun = _last_line(self._cluster.path, "run_started", lambda row: row.get("run") == self._run.name)
        self._events.offset = self._events.offset if handed is None else handed
        self._cluster.offset = self._cluster.offset if begun is None else begun
        return RuleState(losses=losses)

    def _readers(self) -> dict[str, files.LineReader]:
        return {"events": self._events, "metrics": self._metrics, "cluster": self._cluster}

    def _snapshot(self) -> dict[str, Any]:
        """Between two reads: the position, and the state of the rules and limits."""
        offsets = {name: reader.offset for name, reader in self._readers().items()}
        memory, limits = dict(vars(self._rules.memory)), self._limiter.memory()
        return {"run": self._run.id, "offsets": offsets, "memory": memory, "limits": limits}

    async def _remember(self) -> None:
        text = json.dumps({**self._known, "outbox": self._outbox.memory()}, indent=1) + "\n"
        self._remembered = time.monotonic()
        async with self._writing:  # in the order of the calls
            try:
                await asyncio.to_thread(files.write_text, self._run_dir / MEMORY, text)
            except StateError as error:  # an alert may be about the full disk: it is sent anyway
                _say(error.message)

    # -- looking -----------------------------------------------------------------------------------

    async def live(self, ended: asyncio.Event, why: str) -> None:
        """Until `ended`, then send the remaining alerts. `why`: why the run ends, if no driver is left to record it."""
        tasks = [asyncio.create_task(self._serve(name)) for name in self._sinks]
        for parcel in list(self._outbox.parcels):
            for name in set(parcel.due) - set(self._sinks):
                parcel.settle(name, "given up: no longer configured", time.time())
            await self._tell_if_settled(parcel)
        while not ended.is_set():
            await self._look()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), PAUSE)
        await self._look(why)
        self._ending.set()
        limit = LAST_LIMIT if self._rules.memory.over else HANDOVER_LIMIT
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                while self._outbox.parcels:
                    await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        if self._rules.memory.over:
            for parcel in list(self._outbox.parcels):
                for name, due in list(parcel.due.items()):
                    parcel.settle(name, f"given up at the run's end: {due.error or 'out of time'}", time.time())
                await self._tell_if_settled(parcel)
        await self._remember()

    async def _look(self, why: str = "") -> None:
        """Read new rows, and queue their alerts."""
        try:
            rows, end = await asyncio.to_thread(self._read)
            now, wall = time.monotonic(), time.time()
            found = self._rules.take(rows["events"], rows["metrics"], rows["cluster"], now)
            found += self._rules.tick(now, wall, end) + (self._rules.close(wall, why) if why else [])
            found = [await self._completed(alert, now + DETAILS_LIMIT) for alert in found]
        except Exception as error:  # noqa: BLE001  whatever is wrong with a file: the next read may succeed
            complaint, self._complaint = self._complaint, f"cannot check: {type(error).__name__}: {first_line(error)}"
            return _say(self._complaint) if complaint != self._complaint else None
        out = [one for alert in found for one in self._limiter.offer(alert, wall)] + self._limiter.release(wall)
        for alert in out:
            named = replace(alert, id=f"{self._run.id[:8]}-{alert.id}")
            self._outbox.add(message(named, self._run.name, self._cluster_dir.name), self._sinks)
        self._known = self._snapshot()
        if found or out or time.monotonic() - self._remembered > REMEMBER_EVERY:
            await self._remember()
        for news in self._news.values() if out else ():
            news.set()
        return None

    def _read(self) -> tuple[dict[str, list[dict[str, Any]]], float | None]:
        """New rows, and the end of the allocation. Not in the event loop: stalled storage must not stop the sending."""
        if self._roster is not None and self._roster.fenced():
            _say("a newer head was elected: its process continues")
            os._exit(runs.DRIVER_FENCED)
        found: dict[str, list[dict[str, Any]]] = {}
        for name, reader in self._readers().items():
            found[name] = []
            with contextlib.suppress(OSError):  # a stale handle: the next read
                found[name] = reader.read()
        return found, self._roster.end() if self._roster is not None else None

    async def _completed(self, alert: Alert, deadline: float) -> Alert:
        if not alert.ask:
            return alert
        try:
            work = asyncio.to_thread(details.complete, alert, self._run_dir)
            return await asyncio.wait_for(work, deadline - time.monotonic())
        except Exception as error:  # noqa: BLE001  the alert matters more than its details
            _say(f"{alert.kind}: no details: {type(error).__name__}: {first_line(error)}")
            return alert

    # -- sending -----------------------------------------------------------------------------------

    async def _serve(self, name: str) -> None:
        """Send the alerts for one sink, in order."""
        while True:
            parcel = self._outbox.next(name)
            if parcel is None:
                self._news[name].clear()
                await self._news[name].wait()
                continue
            due = parcel.due[name]
            due.first = due.first or time.time()
            result = await alert_sinks.send(name, self._config.alerts, parcel.message)
            due.tries, due.refusals = due.tries + 1, due.refusals + result.refused
            pause = None if result.ok else outbox.pause(due, result, time.time())
            if not result.ok and result.said != due.error:
                _say(f"{name}: {result.said}")
            due.error = result.said
            if pause is not None:
                await self._rest(pause, result.after)
                continue
            parcel.settle(name, "sent" if result.ok else f"given up: {result.said}", time.time())
            await self._tell_if_settled(parcel)

    async def _rest(self, pause: float, asked: float) -> None:
        """Until the next try; shorter at the end of the run, unless the server has requested it."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), pause)
            await asyncio.sleep(asked or min(pause, 1.0))

    async def _tell_if_settled(self, parcel: PendingAlert) -> None:
        """Record an alert that is pending at no sink in the run's events; only then it is removed."""
        if not parcel.due:
            sent = parcel.message
            told = AlertSent(sent["kind"], sent["time"], sent["text"], sent["id"], sent["count"], parcel.done)
            try:
                await asyncio.to_thread(event_log.append, self._run_dir, told)
            except StateError as error:
                _say(error.message)
            self._outbox.parcels.remove(parcel)
        await self._remember()


def _last_line(path: Path, kind: str, matches: Callable[[dict[str, Any]], bool] = lambda _: True) -> int | None:
    """The offset of the last row of that kind. Only these rows are parsed, since ten days of events are many."""
    mark, found, offset = f'"{kind}"'.encode(), None, 0
    with contextlib.suppress(OSError), path.open("rb") as file:
        for line in file:
            if mark in line:
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict) and row.get("kind") == kind and matches(row):
                        found = offset
            offset += len(line)
    return found


def _say(text: str) -> None:
    print(f"alerts: {text}", file=sys.stderr, flush=True)


async def _follow(follower: AlertSender, why: str) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def end() -> None:
        loop.remove_reader(sys.stdin)
        ended.set()

    loop.add_reader(sys.stdin, end)
    await follower.live(ended, why)
    os._exit(0)  # do not wait for threads that resolve a name or read a log


def main() -> None:
    processes.die_with_parent()
    run_dir = Path(sys.argv[1])
    config, run = loader.load_resolved(run_dir / records.CONFIG_FILE), Run.read(run_dir)
    if run is not None and config.alerts.sinks:
        asyncio.run(_follow(AlertSender(run_dir, config, run), "".join(sys.argv[2:3])))


if __name__ == "__main__":
    main()
