"""From lines to one verdict.

Each line is examined once. The cause is what the scheduler reports, else the first finding of the best tier (see
`rules`): an explanation before an exception before a timeout before a lost connection. Later findings of a lower tier
from other ranks are its cascade.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from raylaunch.observe.why.log_lines import Line, body, unprefixed
from raylaunch.observe.why.rules import EXCEPTION, EXIT, EXITS, FRAME, HINTS, RULES, Kind, Tier

SHOWN = 5
"""Lines of evidence, and of cascade, that are shown."""
_LIBRARIES = ("site-packages/", "dist-packages/", "/lib/python", "<frozen", "raylaunch/")
_REPEATS = ("was the direct cause of", "During handling of the above")


@dataclass(frozen=True)
class Evidence:
    """A line that the verdict rests on."""

    file: str
    line: int
    text: str


@dataclass(frozen=True)
class Verdict:
    """What happened, where, and what to do. `confidence`: 0 to 1; `cascade`: the consequences."""

    kind: Kind
    cause: str
    rank: int | None
    host: str | None
    confidence: float
    evidence: tuple[Evidence, ...]
    cascade: tuple[str, ...]
    action: str


NOTHING = Verdict(
    "unknown", "the log does not show the cause", None, None, 0.1, (), (),
    "Check the logs of the other ranks, `sacct -j JOB -o State,ExitCode`, and the logs of the nodes.",
)  # fmt: skip


@dataclass
class LogFinding:
    """The meaning of one line."""

    kind: Kind
    tier: Tier
    cause: str
    action: str
    confidence: float
    line: Line
    order: int
    final: bool = False
    more: list[Line] = field(default_factory=list)

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        return tuple(Evidence(line.file, line.number, line.text.strip()) for line in [*self.more, self.line][-SHOWN:])


def judge(lines: Iterable[Line]) -> Verdict:
    """The verdict on these lines, given in the order in which they were written, if that is known."""
    hosts = Hosts()
    findings = _findings(lines, hosts)
    if not findings:
        return NOTHING
    first = _cause(findings)
    agree = sum(1 for other in findings if other.kind == first.kind and other is not first)
    confidence = min(0.99, first.confidence + 0.01 * min(agree, 3))
    others = [f for f in findings if f.kind != first.kind or f.line.rank != first.line.rank]
    if not first.final and any(f.tier is Tier.ROOT and f.kind != first.kind for f in others):
        confidence *= 0.85  # there is another explanation
    rank = None if first.final else first.line.rank if first.line.rank is not None else hosts.exited
    cascade = [_short(f) for f in others if f.order > first.order and (f.tier > first.tier or f.final)]
    return Verdict(
        first.kind, first.cause, rank, first.line.host or hosts.of(rank), round(confidence, 2), first.evidence,
        tuple(dict.fromkeys(cascade))[:SHOWN], first.action,
    )  # fmt: skip


def _cause(findings: list[LogFinding]) -> LogFinding:
    """The scheduler's message counts, unless the program had failed before: an explanation, or an exception that is not
    the result of a signal."""
    best = min(findings, key=lambda f: (f.tier, f.order))
    setup = next((f for f in findings if f.tier is Tier.SETUP), None)
    if setup is not None and best.kind == "import_error" and setup.order < best.order:
        return setup
    final = next((f for f in findings if f.final), None)
    if final is not None and final.kind == "node_failure":  # each node's daemon says it; srun says which node it was
        final = next((f for f in findings if f.final and "Node failure on" in f.line.text), final)
    stuck = next((f for f in findings if f.kind in _STUCK), None)
    if final is not None and final.kind == "time_limit" and stuck is not None and stuck.order < final.order:
        return min((f for f in findings if f.order < final.order), key=lambda f: (f.tier, f.order))
    if final is not None and (best.final or best.order > final.order or best.tier >= Tier.SYMPTOM):
        return final
    return best


_STUCK = {"nccl_timeout", "hang"}
"""A job waits in these until its time limit."""


class Hosts:
    """The host of each rank, from other messages: those of srun about its tasks, torchrun's summary, NCCL."""

    _TASK = re.compile(r"srun: error: ([A-Za-z][\w.-]*): tasks? (\d+)(?:-(\d+))?:")
    _NCCL = re.compile(r"\b([A-Za-z][\w.-]*):\d+:\d+ \[\d\] NCCL")
    _PDSH = re.compile(r"^\s*([A-Za-z][\w.-]*): \[(?:rank)?\d+\]")
    _SUMMARY = re.compile(r"^\s*(host|rank)\s+: (\S+)")

    def __init__(self) -> None:
        self._known: dict[int, str] = {}
        self._all: set[str] = set()
        self._last = ""
        self._root = False
        self.exited: int | None = None
        """The first task that ended by itself, not by a signal from outside."""

    def look(self, line: Line, text: str) -> None:
        if line.host is not None:
            self._all.add(line.host)
        if (task := self._TASK.search(text)) is not None:
            self._all.add(task[1])
            if self.exited is None and "Terminated" not in text:
                self.exited = int(task[2])
            for rank in range(int(task[2]), min(int(task[3] or task[2]), int(task[2]) + 4096) + 1):
                self._known.setdefault(rank, task[1])
        elif (said := self._SUMMARY.match(text)) is not None:
            if said[1] == "host":
                self._last = said[2]
            elif said[2].isdigit():
                if self._last not in ("", "localhost"):
                    self._known[int(said[2])] = self._last
                    self._all.add(self._last)
                if self._root and self.exited is None:
                    self.exited = int(said[2])
        elif "Failures:" in text or "Root Cause" in text:
            self._root = "Root Cause" in text
        for pattern in (self._NCCL, self._PDSH):
            if (found := pattern.search(line.text)) is not None:
                self._all.add(found[1])
                if line.rank is not None:
                    self._known[line.rank] = found[1]

    def of(self, rank: int | None) -> str | None:
        """The host of that rank; if there is only one host, that one."""
        if rank in self._known:
            return self._known[rank]
        return next(iter(self._all)) if len(self._all) == 1 else None


def _findings(lines: Iterable[Line], hosts: Hosts) -> list[LogFinding]:
    found: list[LogFinding] = []
    frames: dict[tuple[str, int | None], list[Line]] = {}
    quoted: set[tuple[str, int | None]] = set()
    for order, line in enumerate(lines):
        who = (line.file, line.rank)
        if who in quoted:
            quoted.discard(who)
            if _is_code(line):
                continue
        lowered = line.text.lower().replace("info", "")  # else each line of a logger has "inf" in it
        if not any(hint in lowered for hint in HINTS):
            continue
        text = unprefixed(line.text)
        hosts.look(line, text)
        if FRAME.match(text):
            frames.setdefault(who, []).append(line)
            quoted.add(who)
            continue
        if _WARNS.search(text):
            continue
        text = _GUESSES.split(text, maxsplit=1)[0]
        if any(mark in text for mark in _REPEATS):
            frames.pop(who, None)
            continue
        one = _meaning(line, text, order)
        exception = EXCEPTION.match(text.strip())
        if one is None and exception is not None and exception[1].rpartition(".")[2] not in _QUIET:
            one = _exception(line, exception[1], exception[2] or "", order)
        if one is None:
            continue
        if exception is not None:
            one.more = _place(frames.pop(who, []))
        found.append(one)
    if not found and frames:
        place = _place(next(iter(frames.values())))[0]
        cause = "a traceback ends before its last line"
        found.append(
            LogFinding(
                "python_exception",
                Tier.ERROR,
                cause,
                "See that line, and the end of the rank's log.",
                0.5,
                place,
                0,
            )
        )
    return found


_WARNS = re.compile(r"(?::\d+: |^\s*)\w*Warning: |^\s*warnings\.warn\(")
"""Python's warnings, which are not failures."""
_GUESSES = re.compile(r"Some common causes include|There are some potential root causes")
"""Ray prints this about every worker that died: a list of all possible causes."""


def _is_code(line: Line) -> bool:
    """Whether the line below a frame quotes source code, which must not match any rule."""
    text = body(line.text)
    return text.startswith("   ") and not FRAME.match(text)


_QUIET = {"SystemExit", "KeyboardInterrupt", "StopIteration", "UserWarning", "DeprecationWarning", "FutureWarning",
          "RuntimeWarning", "ResourceWarning", "WorkerGroupError", "ControllerError",
          "TrainingFailedError"}  # fmt: skip
"""Not causes. (Those of Ray Train only state that a worker failed.)"""


def _meaning(line: Line, text: str, order: int) -> LogFinding | None:
    for rule in RULES:
        if (match := rule.pattern.search(text)) is not None:
            groups = [" ".join((g or "").split())[:200] for g in match.groups()]
            cause = rule.cause.format(*groups) if "{" in rule.cause else rule.cause
            if "rank" in rule.pattern.groupindex:
                line = replace(line, rank=int(match["rank"]))
            return LogFinding(rule.kind, rule.tier, cause, rule.action, rule.confidence, line, order, rule.final)
    if (match := EXIT.search(text)) is not None:
        number = int(next(group for group in match.groups() if group is not None))
        code = 128 - number if number < 0 else 128 + number if match[3] is not None else number
        if code in EXITS:
            kind, tier, cause, action, confidence = EXITS[code]
            return LogFinding(kind, tier, cause, action, confidence, line, order)
    return None


def _exception(line: Line, name: str, said: str, order: int) -> LogFinding:
    cause = f"{name.rpartition('.')[2]}: {said}" if said else name
    return LogFinding(
        "python_exception", Tier.ERROR, cause[:300],
        "The exception comes from the program: see the line in the evidence.", 0.85, line, order,
    )  # fmt: skip


def _place(frames: list[Line]) -> list[Line]:
    """Of a traceback: the last frame in the user's code, else the last frame."""
    own = [frame for frame in frames if not any(mark in frame.text for mark in _LIBRARIES)]
    return (own or frames)[-1:]


def _short(finding: LogFinding) -> str:
    who = f"rank {finding.line.rank}" if finding.line.rank is not None else finding.line.host or ""
    text = unprefixed(finding.line.text).strip()
    text = text if len(text) <= 160 else f"{text[:159]}…"
    return f"{who}: {text}" if who else text


def on(verdict: Verdict, **facts: Any) -> Verdict:
    """The same verdict, with these fields replaced (unless None)."""
    return replace(verdict, **{key: value for key, value in facts.items() if value is not None})
