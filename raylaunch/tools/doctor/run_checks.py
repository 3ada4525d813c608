"""The command line's side of the node checks: create a temporary directory in the state directory, allocate nodes,
collect their results in three stages (see `mailbox`), judge them. At the end, also after errors, the nodes are released
and the directory is removed. Every wait has a time limit.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.errors import BringUpError, SlurmError, StateError
from raylaunch.scheduler.slurm import batch_script
from raylaunch.state import files
from raylaunch.tools.doctor import compare_nodes, mailbox, pairwise
from raylaunch.tools.doctor.check_job import Allocation, LocalProcesses, Show, SlurmJob, StillWaiting
from raylaunch.tools.doctor.finding import Finding, problem, unknown, warning
from raylaunch.tools.doctor.mailbox import Checked, Hello, Model, Pairs, Peer, PeerList, Schedule

FOLDER = "doctor"
GRACE = 5.0
"""Seconds that the job gets to end by itself after its checks."""
STALE = 3600.0
"""Seconds after which directories of killed commands are removed."""
LATE = (30.0, 4.0)
"""A node is not awaited beyond this many seconds and this multiple of the time that half of the nodes needed."""
CHECK_LIMIT = mailbox.GPU_LIMIT + 2 * mailbox.CONNECT_LIMIT + 30
_DOING = {
    "hello": "starting the checks",
    "checked": "testing connections, importing torch",
    "pairs": "measuring bandwidth",
}


def run(config: Config, state_dir: Path, backend: str, patience: float, show: Show) -> list[Finding]:
    """Allocate the requested nodes and check them; `patience`: maximum seconds in the queue."""
    try:
        with _directory(state_dir) as directory:
            return _on_nodes(config, directory, backend == "local", patience, show)
    except StillWaiting as error:
        return [unknown("nodes.job", error.message, error.hint)]
    except (BringUpError, SlurmError, StateError) as error:
        return [problem("nodes.job", " ".join(error.message.split()), error.hint)]


def _on_nodes(config: Config, directory: Path, local: bool, patience: float, show: Show) -> list[Finding]:
    canary = secrets.token_hex(16)
    files.write_text(directory / mailbox.CONFIG, loader.dump(config))
    files.write_text(directory / mailbox.CANARY, canary)
    held: Allocation
    held = (
        LocalProcesses(config.slurm.max_nodes, directory, canary)
        if local
        else SlurmJob(config.slurm, directory, canary)
    )
    left, grace = "", 0.0
    try:
        held.start()
        findings = Checks(config, directory, held, local, show).run(held.nodes(patience, show))
        grace = GRACE
    finally:
        show("releasing the nodes")
        left = held.end(grace)
    return [*findings, warning("nodes.job", left, "Otherwise, it ends within minutes.")] if left else findings


@contextlib.contextmanager
def _directory(state_dir: Path) -> Iterator[Path]:
    """A temporary directory in the state directory. Old directories of killed commands are removed."""
    folder = files.make_dir(state_dir / FOLDER)
    for old in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > STALE:
                shutil.rmtree(old, ignore_errors=True)
    directory = files.make_dir(folder / secrets.token_hex(4))
    try:
        yield directory
    finally:
        for _ in range(5):  # NFS keeps files that are still open on a node
            shutil.rmtree(directory, ignore_errors=True)
            if not directory.exists():
                break
            time.sleep(0.5)
        with contextlib.suppress(OSError):
            folder.rmdir()  # not while another doctor is at work


class Checks:
    """The three stages of node checks."""

    def __init__(self, config: Config, directory: Path, held: Allocation, local: bool, show: Show) -> None:
        self.config, self.directory, self.held, self.local, self.show = config, directory, held, local, show

    def run(self, names: Sequence[str]) -> list[Finding]:
        seen: dict[float, float] = {}
        hellos = self._collect(
            "hello", Hello, range(len(names)), mailbox.HELLO_LIMIT,
            heard=lambda hello: seen.setdefault(hello.time, time.time()),
            over=lambda found: len(self.held.failures().keys() | {names[i] for i in found}) == len(names),
        )  # fmt: skip
        findings = [*compare_nodes.arrived(hellos, names, self.held.failures())]
        asked = 0 if self.local else batch_script.gpus_per_node(self.config.slurm)
        findings += compare_nodes.alike(hellos, bool(self.config.slurm.modules), asked)
        fields = set(Peer.model_fields)
        able = {i: Peer(**h.model_dump(include=fields)) for i, h in sorted(hellos.items()) if not h.error}
        if not able:
            return findings
        called = {index: place.node for index, place in able.items()}
        written = time.time()
        mailbox.write(self.directory / mailbox.ROSTER, PeerList(nodes=tuple(able.values())))
        checked = self._collect("checked", Checked, able, CHECK_LIMIT)
        if broken := self._broken(checked, called):
            return findings + broken
        reach, bad, apart = compare_nodes.reachable(checked, called)
        findings += [*_silent(checked, called), *reach, *compare_nodes.clocks(checked, called)]
        findings += [*compare_nodes.torch_errors(checked, called), *compare_nodes.gpu_checks(checked, hellos)]
        if not self.local:
            findings.append(compare_nodes.login_clock(written, [row.time for row in checked.values()], seen))
        sick = {i for i, row in checked.items() if row.torch or any(gpu.error for gpu in row.gpus)}
        well = sorted(checked.keys() - bad - sick)
        rounds = [[(well[a], well[b]) for a, b in one] for one in pairwise.rounds(len(well), mailbox.PARTNERS)]
        rounds = [[pair for pair in one if pair not in apart] for one in rounds]
        rounds *= 2 if len(rounds) <= mailbox.PARTNERS // 2 else 1  # few partners: measure each pair twice
        return findings + self._pairs(able, hellos, well, rounds)

    def _broken(self, found: Mapping[int, object], names: Mapping[int, str]) -> list[Finding]:
        """A finding if the job ended early, so that results are missing."""
        if len(found) == len(names) or self.held.alive():
            return []
        hint = (
            "Slurm ends the step if it cannot reach a node. Check the node in this message, or one without a response."
        )
        return [problem("nodes.job", f"the job ended early: {self.held.complaint() or 'no error message'}", hint)]

    def _pairs(
        self, able: Mapping[int, Peer], hellos: Mapping[int, Hello], well: list[int], rounds: list[list[pairwise.Pair]]
    ) -> list[Finding]:
        """Measure the nodes that passed the checks so far."""
        gpus = min((len(hellos[i].gpus) for i in well), default=0)
        schedule = Schedule(
            nodes=tuple(able[i] for i in well),
            rounds=tuple(map(tuple, rounds)),
            backend="nccl" if gpus else "gloo",
            locals=max(1, gpus),
        )
        mailbox.write(self.directory / mailbox.SCHEDULE, schedule)
        if not any(rounds):
            few = unknown("bandwidth.pairs", "not measured: fewer than two nodes passed the other checks")
            return [few] if len(able) > 1 else []
        done = self._collect("pairs", Pairs, well, (len(rounds) + 2) * mailbox.ROUND_LIMIT, alike=False)
        names = {i: able[i].node for i in well}
        silent = self._broken(done, names) or _silent(done, names)
        return [*silent, *compare_nodes.bandwidth(done, names, schedule.backend)]

    def _collect(
        self, what: str, model: type[Model], wanted: Collection[int], limit: float,
        heard: Callable[[Model], object] = lambda _: None, over: Callable[[dict[int, Model]], bool] = lambda _: False,
        alike: bool = True,
    ) -> dict[int, Model]:  # fmt: skip
        """Collect the nodes' files of a stage; `heard` is called for each. Ends after `limit` seconds, or if `over`. If
        all nodes need about the same time (`alike`), LATE applies once half of them are done."""
        began, half = time.monotonic(), 0.0

        def enough(found: dict[int, Model]) -> bool:
            nonlocal half
            self.show(f"{_DOING[what]}: {len(found)} of {len(wanted)} nodes")
            took = time.monotonic() - began
            half = half or (took if 2 * len(found) >= len(wanted) else 0.0)
            most = min(limit, max(LATE[0], LATE[1] * half)) if half and alike else limit
            return took > most or over(found) or not self.held.alive()

        return mailbox.collect({i: mailbox.file(self.directory, i, what) for i in wanted}, model, heard, enough)


def _silent(found: Mapping[int, object], names: Mapping[int, str]) -> Iterator[Finding]:
    hint = "Check whether the node is up: `sinfo -N`, or its console."
    for index, name in names.items():
        if index not in found:
            yield problem("nodes.silent", "stopped responding during the checks", hint, name)
