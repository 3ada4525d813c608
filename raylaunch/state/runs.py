"""Runs: making, continuing, stopping and reading a run directory. No Ray, no torch.

A run's state is in run.json. The command line writes it once ("queued"); from then on the driver
does, and the head's agent only when the driver died without a last word (`finalize`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raylaunch.checkpoint import store
from raylaunch.checkpoint.store import RetentionPolicy
from raylaunch.config import loader, secrets
from raylaunch.config.schema import STDLIB, Config, TrainerConfig, continuation_differences
from raylaunch.errors import RunError, StateError, UsageError
from raylaunch.host import locks
from raylaunch.state import event_log, files, provenance, records
from raylaunch.state.records import Record
from raylaunch.state.run_events import RunFailed, RunQueued

FINAL = {"finished", "failed", "stopped"}
HAND_OVER_LIMIT = 30.0
"""Seconds to wait for another command that hands a run over: longer than sbatch and a look at the queue may take."""
TRACKER_PACKAGES = ("wandb", "mlflow")
"""Trackers that need a package of their name, which the extra of that name brings."""
DRIVER_FENCED = 75
"""The exit code of a driver that found a newer incarnation: another one has the run."""


@dataclass(frozen=True)
class Run(Record):
    """run.json."""

    name: str
    state: str
    cluster: str
    created: float
    id: str = ""
    """Of one handing over: the same name may be handed over again while the last driver still goes home."""
    attempt: int = 0
    incarnation_offset: int = 0
    """A run's incarnation is this and its head's incarnation. Another cluster counts from one again, and the
    fences of the hand-overs before this one would keep it out."""
    world_size: int = 0
    nodes: int = 0
    reason: str = ""
    updated: float = 0.0

    @classmethod
    def read(cls, directory: Path) -> Run | None:
        value = files.read_json(directory / records.RUN_FILE)
        return None if value is None else cls.parse(value)

    def save(self, directory: Path, **changes: Any) -> Run:
        """Write it with these changes, and return that."""
        changed = replace(self, updated=time.time(), **changes)
        changed.write(directory / records.RUN_FILE)
        return changed


def directory(cluster_dir: Path, name: str) -> Path:
    """A run's directory, from the directory of a cluster of the same state directory."""
    return files.run_dir(cluster_dir.parent.parent, name)


def checkpoint_dir(run: Path, config: Config) -> Path:
    """Where a run's checkpoints lie; an own checkpoint_dir gets a directory per run."""
    own = config.checkpoint.checkpoint_dir
    return Path(own).expanduser() / run.name if own else run / "checkpoints"


@contextlib.contextmanager
def handing_over(run: Path) -> Iterator[None]:
    """One `train` or `submit` at a time, from its look at the run that is there to the request. The lock is the state
    directory's: a run's own directory may be moved aside meanwhile."""
    files.make_dir(run.parent)
    path = run.parent / ".lock"
    with locks.held(path, HAND_OVER_LIMIT) as is_ours:
        if not is_ours:
            raise RunError(
                f"another `raylaunch train` or `submit` has been submitting a run for {HAND_OVER_LIMIT:g} s",
                f"Try again. If that command is frozen, find its process with `fuser {path}`.",
            )
        yield


@contextlib.contextmanager
def prepared(run: Path, config: Config, cluster: str, fresh: bool = False) -> Iterator[Run]:
    """Make a run's directory, or check that `config` can continue what is there; hand it over inside.

    Raises RunError with the differences when it cannot, and UsageError when the run is finished
    already. With `fresh` an old run is moved aside, never deleted. When the handing over fails, all
    is as it was: a run that was made for it goes, one that was moved aside comes back.
    """
    config = with_absolute_paths(config)
    check_script(config.trainer)
    check_trackers(config)
    config = config.model_copy(update={"alerts": secrets.resolved(config.alerts)})
    old = Run.read(run)
    if old is not None and not fresh:
        config = _continued(run, old, config)
        text = (run / records.CONFIG_FILE).read_text()
        try:
            yield _write(run, config, cluster, old)
        except BaseException:
            files.write_text(run / records.CONFIG_FILE, text)
            old.save(run)
            raise
        provenance.record(run, config.trainer.chdir)
        return
    aside = run.with_name(f"{run.name}.{time.strftime('%Y%m%d-%H%M%S')}") if run.exists() else None
    if aside is not None:
        run.rename(aside)
    try:
        yield _write(run, config, cluster, None)
    except BaseException:
        shutil.rmtree(run, ignore_errors=True)
        if aside is not None:
            aside.rename(run)
        raise
    provenance.record(run, config.trainer.chdir)  # behind the hand-over: it waits for nothing


def _continued(run: Path, old: Run, config: Config) -> Config:
    """The config with which an old run goes on, or why it cannot."""
    before = loader.load_resolved(run / records.CONFIG_FILE)
    differences = continuation_differences(before, config)
    if differences:
        raise RunError(
            f"run {run.name} cannot continue with this config:\n    " + "\n    ".join(differences),
            f"Undo these changes, choose another name with --run, or start over with --fresh ({run} is kept).",
        )
    if old.state == "finished" and config.trainer.script is not None:
        if config.trainer.args == before.trainer.args:
            raise UsageError(
                f"run {run.name} is finished",
                "Change the arguments of the script (trainer.args), or start over with --fresh or another --run.",
            )
    elif old.state == "finished" and config.step_scheduler.max_steps <= before.step_scheduler.max_steps:
        raise UsageError(
            f"run {run.name} is finished, at step {before.step_scheduler.max_steps}",
            "Raise step_scheduler.max_steps to continue, or start over with --fresh or another --run.",
        )
    if config.step_scheduler.global_batch_size is None:  # the run's own stays in force
        config = with_global_batch(config, before.step_scheduler.global_batch_size)
    return config


def _write(run: Path, config: Config, cluster: str, old: Run | None) -> Run:
    for part in (".", records.LOGS, "attempts"):
        files.make_dir(run / part)
    files.write_text(run / files.STOP_FILE, files.NO_STOP)
    files.write_text(run / records.CONFIG_FILE, loader.dump(config))
    created, attempt = (old.created, old.attempt) if old else (time.time(), 0)
    base, _ = store.owner(checkpoint_dir(run, config))
    record = Run(run.name, "queued", cluster, created, uuid.uuid4().hex, attempt, base)
    event_log.append(run, RunQueued(cluster, continued=old is not None))
    return record.save(run)


def check_trackers(config: Config) -> None:
    """RunError for a tracker whose package is not installed: the extra of that name brings it."""
    for name in config.trackers:
        if name in TRACKER_PACKAGES and importlib.util.find_spec(name) is None:
            raise RunError(f"{name} is turned on, but its package is not installed", f"pip install 'raylaunch[{name}]'")


def check_script(trainer: TrainerConfig) -> None:
    """Before nodes are held for it."""
    if trainer.script is None:
        return
    script, chdir = Path(trainer.script), Path(str(trainer.chdir))
    if not script.is_file():
        raise UsageError(f"trainer.script: no such file: {script}", "Give a path that all nodes share.")
    if script.suffix != ".py" and not os.access(script, os.X_OK):
        raise UsageError(f"trainer.script: {script} is neither a .py file nor executable", f"chmod +x {script}")
    if not chdir.is_dir():
        raise UsageError(f"trainer.chdir: no such directory: {chdir}", "Give one that all nodes share.")


def with_absolute_paths(config: Config) -> Config:
    """Relative paths as the command line's directory has them: a worker's directory is another."""

    def absolute(path: str) -> str:
        return path if path == STDLIB or "://" in path else str(Path(path).expanduser().absolute())

    def maybe(path: str | None) -> str | None:
        return absolute(path) if path else None

    trainer, data = config.trainer, config.data
    chdir = absolute(trainer.chdir or ".")
    script = str(Path(chdir, Path(trainer.script).expanduser())) if trainer.script is not None else None
    trainer = trainer.model_copy(update={"script": script, "chdir": chdir})
    data = data.model_copy(
        update={
            "text": [absolute(path) for path in data.text],
            "prepared": maybe(data.prepared),
            "mixture": {absolute(path): weight for path, weight in data.mixture.items()},
            "validation": maybe(data.validation),
        }
    )
    hf = config.model.hf
    hf = absolute(hf) if hf and Path(hf).expanduser().is_dir() else hf  # else a name on the hub
    model = config.model.model_copy(update={"init_from": maybe(config.model.init_from), "hf": hf})
    checkpoint = config.checkpoint.model_copy(update={"checkpoint_dir": maybe(config.checkpoint.checkpoint_dir)})
    return config.model_copy(update={"data": data, "checkpoint": checkpoint, "trainer": trainer, "model": model})


def keep(config: Config) -> RetentionPolicy:
    """Which checkpoints stay."""
    own = config.checkpoint
    return RetentionPolicy(own.keep_last_n_checkpoints, own.keep_every_n_steps, own.keep_best)


def with_global_batch(config: Config, size: int | None) -> Config:
    """The config with the run's global batch written down; grad_acc_steps has done its work then."""
    steps = config.step_scheduler.model_copy(
        update={"global_batch_size": size, **({"grad_acc_steps": None} if size else {})}
    )
    return config.model_copy(update={"step_scheduler": steps})


def request_stop(run: Path, reason: str, continues: bool = False) -> None:
    """Ask a run to save and end; taken at its next step. With `continues` it is queued again then: its
    cluster goes on in another allocation. Who asked it to end for good, is obeyed."""
    with contextlib.suppress(StateError):
        asked = files.read_json(run / files.STOP_FILE) if continues else None
        if asked is not None and not asked.get("continues"):
            return
    files.write_json(run / files.STOP_FILE, {"reason": reason, "continues": continues, "time": time.time()})


def clear_stop(run: Path) -> None:
    """Take a request to stop back: the run goes on."""
    files.write_text(run / files.STOP_FILE, files.NO_STOP)


def stop_continues(run: Path) -> bool:
    """Whether the run that was asked to stop goes on in another allocation."""
    wanted = files.read_json(run / files.STOP_FILE)
    return wanted is not None and bool(wanted.get("continues"))


def stop_reason(run: Path) -> str | None:
    """Why the run was asked to stop, None when it was not."""
    wanted = files.read_json(run / files.STOP_FILE)
    return None if wanted is None else str(wanted.get("reason", ""))


def finalize(run: Path, status: int, id: str) -> str:
    """The last state of the run that was handed over as `id`, after its driver ended with `status`;
    written down if the driver could not."""
    record = Run.read(run)
    if record is None or record.id != id:  # handed over anew already: that one's state is not ours
        return "finished" if status == 0 else "failed"
    if record.state == "queued" and stop_continues(run):
        return record.state
    if record.state not in FINAL:
        cause = f"signal {-status}" if status < 0 else f"exit code {status}"
        reason = f"the driver ended without a last word ({cause}); see logs/driver.log"
        record = record.save(run, state="failed", reason=reason)
        event_log.append(run, RunFailed(reason))
    return record.state


def last_metrics(run: Path, size: int = 8192) -> dict[str, Any]:
    """The last complete line of metrics.jsonl that has a loss; {} when there is none."""
    try:
        with (run / files.METRICS_FILE).open("rb") as source:
            source.seek(max(0, os.fstat(source.fileno()).st_size - size))
            lines = source.read().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            row = dict(json.loads(line)) if line.endswith(b"\n") else {}
        except ValueError:
            continue  # cut off by where we began to read
        if "loss" in row:
            return row
    return {}
