"""What the Slurm tests share: one user's raylaunch on a sandbox, run as people run it, and looking at
what is left behind. Every command's output is checked for tracebacks; every wait is bounded."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hostlist
import pytest

import raylaunch
from raylaunch.state import files
from raylaunch.tools.sandbox import Sandbox, missing
from raylaunch.tools.sandbox.procs import wait_for

__all__ = [
    "BIN",
    "LIMIT",
    "NOBODY",
    "Command",
    "Done",
    "Site",
    "disk_at",
    "mounted",
    "own_sandbox",
    "python_for_all",
    "same_curve",
    "wait_for",
    "write_texts",
]

BIN = Path(sys.executable).parent
NOBODY = 65534
LIMIT = float(os.environ.get("RAYLAUNCH_TEST_PATIENCE", "300"))
"""Seconds that a command or a wait gets; far more than any needs on a busy machine."""
SLURM_COMMANDS = ("sacct", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    line: str
    code: int
    out: str
    err: str

    @property
    def all(self) -> str:
        return self.out + self.err

    def expect(self, code: int, *words: str) -> Done:
        """Assert the exit code, and that these words were said."""
        assert self.code == code, self
        for word in words:
            assert word in self.all, (word, str(self))
        return self

    def __str__(self) -> str:
        return f"$ {self.line}\n{self.out}{self.err}exit code {self.code}"


class Command:
    """A raylaunch command that runs in the background, its output in files."""

    def __init__(self, line: str, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self.line, self.process, self._out, self._err = line, process, out, err

    @property
    def said(self) -> str:
        return self._out.read_text() + self._err.read_text()

    def wait_said(self, words: str, limit: float = LIMIT) -> None:
        """Wait until it has said this; it must not end before."""

        def there() -> bool:
            ended = self.process.poll() is not None
            if words in self.said:
                return True
            assert not ended, f"{self.line} ended without saying {words!r}:\n{self.said}"
            return False

        wait_for(f"{words!r}", there, limit, lambda: self.said)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def ended(self, limit: float = LIMIT) -> Done:
        """Wait for its end."""
        code = self.process.wait(limit)
        done = Done(self.line, code, self._out.read_text(), self._err.read_text())
        assert "Traceback" not in done.all, str(done)
        return done


@dataclass
class Site:
    """One user's raylaunch on a sandbox: a state directory and a home of their own."""

    sandbox: Sandbox
    state: Path
    uid: int = 0
    command: tuple[str, ...] = (str(BIN / "raylaunch"),)
    common_python: Path | None = None
    _commands: list[Command] = field(default_factory=list)

    @classmethod
    def make(cls, sandbox: Sandbox, name: str, uid: int = 0, python: Path | None = None) -> Site:
        """`python`: for a user who may not run ours."""
        directory = sandbox.layout.state / name
        for path in (directory, directory / "home"):
            path.mkdir(mode=0o755)
            os.chown(path, uid, uid)
        made = cls(sandbox, directory, uid)
        if python is not None:
            made.command = (str(python), "-c", "from raylaunch.cli import main; main()")
        return made

    @property
    def env(self) -> dict[str, str]:
        """The environment of this user's shell. (Where torch caches, it notes in the environment of our process.)"""
        foreign = ("SLURM", "SBATCH", "RAY", "XDG_", "TORCHINDUCTOR_", "COLUMNS", "LINES")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        own = {"HOME": str(self.state / "home"), "RAYLAUNCH_STATE_DIR": str(self.state), "TERM": "dumb"}
        path = f"{BIN}{os.pathsep}{kept.get('PATH', os.defpath)}"
        return {**kept, **self.sandbox.env(), **own, "PATH": path}

    def start(self, *args: object, env: Mapping[str, str] | None = None, terminal: bool = False) -> Command:
        """`raylaunch ARGS` in the background; on a terminal of its own, where asked."""
        words = [str(arg) for arg in args]
        line = [*self.command, *words]
        if terminal:
            line = ["script", "--quiet", "--return", "--command", shlex.join(line), "/dev/null"]
            env = {"TERM": "xterm", **(env or {})}
        number = len(self._commands)
        out, err = (self.state / "home" / f"{number}.{name}" for name in ("out", "err"))
        with out.open("wb") as to_out, err.open("wb") as to_err:
            process = subprocess.Popen(
                # A test run in the background of a shell ignores SIGINT, and would hand that down.
                ["env", "--default-signal=INT", *line],
                stdin=subprocess.DEVNULL, stdout=to_out, stderr=to_err, cwd="/", start_new_session=True,
                env={**self.env, **(env or {})}, **self._as_user(),
            )  # fmt: skip
        self._commands.append(Command(f"raylaunch {' '.join(words)}", process, out, err))
        return self._commands[-1]

    def run(
        self, *args: object, env: Mapping[str, str] | None = None, terminal: bool = False, limit: float = LIMIT
    ) -> Done:
        """`raylaunch ARGS`, to its end."""
        return self.start(*args, env=env, terminal=terminal).ended(limit)

    def _as_user(self) -> dict[str, Any]:
        return {"user": self.uid, "group": self.uid, "extra_groups": []} if self.uid else {}

    def slurm(self, *argv: str, limit: float = 30) -> str:
        """Output of one of Slurm's commands."""
        done = subprocess.run(
            argv, env=self.env, cwd="/", capture_output=True, text=True, timeout=limit, check=False,
            **self._as_user(),
        )  # fmt: skip
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    # -- looking ---------------------------------------------------------------------------------

    @contextmanager
    def slurm_calls(self) -> Iterator[tuple[dict[str, str], list[str]]]:
        """An environment for `run` in which Slurm's commands are written down, and the list of them, filled at the end."""
        calls: list[str] = []
        with tempfile.TemporaryDirectory(dir=self.state / "home") as place:
            log, path = Path(place, "log"), self.env["PATH"]
            for command in SLURM_COMMANDS:
                shim = Path(place, command)
                shim.write_text(f'#!/bin/sh\necho "{command} $*" >> {log}\nPATH={path!r} exec {command} "$@"\n')
                shim.chmod(0o755)
            yield {"PATH": f"{place}{os.pathsep}{path}"}, calls
            calls += log.read_text().splitlines() if log.exists() else []

    def cluster(self, name: str) -> Path:
        return files.cluster_dir(self.state, name)

    def run_dir(self, name: str) -> Path:
        return files.run_dir(self.state, name)

    def status(self) -> dict[str, Any]:
        """`raylaunch status --json`."""
        found: dict[str, Any] = json.loads(self.run("status", "--json").expect(0).out)
        return found

    def cluster_status(self, name: str) -> dict[str, Any]:
        return next(row for row in self.status()["clusters"] if row["name"] == name)

    def run_status(self, name: str) -> dict[str, Any]:
        found = self.status()
        rows = [run for row in found["clusters"] for run in row["runs"]] + found["runs"]
        return next(row for row in rows if row["name"] == name)

    def members(self, name: str) -> dict[str, dict[str, Any]]:
        """members.json: node → what its agent said."""
        table = files.read_json(self.cluster(name) / "members.json")
        return {row["name"]: row for row in table["nodes"]}

    def events(self, directory: Path, kind: str | None = None) -> list[dict[str, Any]]:
        rows = files.read_lines(directory / "events.jsonl")
        return [row for row in rows if kind is None or row["kind"] == kind]

    def losses(self, run: str) -> dict[int, float]:
        """Step → loss; of a step that was done again after a fault, the last word."""
        rows = files.read_lines(self.run_dir(run) / "metrics.jsonl")
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    def jobs(self) -> list[str]:
        """This user's jobs that have not ended, as `id state`."""
        user = str(self.uid)
        return self.slurm("squeue", "-h", "-u", user, "-o", "%i %T").splitlines()

    def job_nodes(self, job: str) -> list[str]:
        """The nodes that Slurm says a job holds."""
        return hostlist.expand_hostlist(self.slurm("squeue", "-h", "-j", job, "-o", "%N").strip())

    def wait_step(self, run: str, step: int) -> None:
        """Wait until the run has committed this step."""
        wait_for(
            f"run {run} commits step {step}",
            lambda: any(row["step"] >= step for row in self.events(self.run_dir(run), "commit")),
            LIMIT,
            lambda: str(self.events(self.run_dir(run))[-8:]),
        )

    # -- what is left ----------------------------------------------------------------------------

    def left(self, nodes: Sequence[str] | None = None) -> list[str]:
        """What of this user there is: jobs, processes and files in the nodes' /tmp, tokens, commands."""
        found = [f"job {job}" for job in self.jobs()]
        found += [f"token {path}" for path in self.state.glob("clusters/*/token")]
        found += [f"command {c.line}" for c in self._commands if c.process.poll() is None]
        for node in nodes or [n.name for n in self.sandbox.status().nodes if n.running]:
            found += [f"{node}: process {line}" for line in self.processes(node)]
            found += [f"{node}: {path}" for path in self._files(node)]
        return found

    def _files(self, node: str) -> list[str]:
        """This user's files in a node; the top of them is telling enough. Of what goes while it looks, find complains."""
        look = [
            "env",
            "LC_ALL=C",
            "find",
            "/tmp",
            "/dev/shm",
            "-mindepth",
            "1",
            "-maxdepth",
            "2",
            "-uid",
            str(self.uid),
        ]
        done = self.sandbox.exec(node, look, cwd="/", capture_output=True, text=True, timeout=60)
        went = re.compile(r"find: .*: No such file or directory")
        assert all(went.fullmatch(line) for line in done.stderr.splitlines()), done.stderr
        assert done.returncode == 0 or done.stderr, done
        return str(done.stdout).split()

    def processes(self, node: str) -> list[str]:
        """This user's processes in a node, but for the sandbox's own and Slurm's, as `pid args`."""
        text = self.inside(node, "ps", "-ww", "-eo", "uid:1,pid:1,args")  # -ww: as long as they are
        rows = [line.split(None, 2) for line in text.splitlines()[1:]]
        ours = [row for row in rows if int(row[0]) == self.uid and row[1] != "1"]
        return [
            f"{row[1]} {row[2]}"
            for row in ours
            if not row[2].startswith(("slurmd ", "ps -ww")) and "<defunct>" not in row[2]
        ]

    def wait_clean(self, limit: float = LIMIT) -> None:
        """Nothing is left, after the moment that Slurm needs to notice the end of a job."""
        wait_for("nothing left", lambda: not self.left(), limit, lambda: self.with_logs(self.left()))

    def with_logs(self, left: list[str]) -> str:
        """What is left, and what the newest cluster's logs say last: on these nodes, and in its jobs' output."""
        newest = max(self.state.glob("clusters/*/logs"), key=lambda logs: logs.stat().st_mtime, default=self.state)
        names = sorted({line.partition(":")[0] for line in left} | {"slurm-"})
        paths = [path for name in names for path in sorted(newest.glob(f"{name}*"))]
        return "\n".join([*left, *(f"{path}:\n{path.read_text(errors='replace')[-3000:]}" for path in paths)])

    def inside(self, node: str, *argv: str) -> str:
        """Output of a command in a node, as root."""
        done = self.sandbox.exec(node, argv, cwd="/", capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return str(done.stdout)

    def end_commands(self) -> None:
        """Kill the commands that still run."""
        for command in self._commands:
            if command.process.poll() is None:
                command.process.kill()
                command.process.wait()

    def end(self) -> None:
        """End whatever a failed test may have left; no test's assertion."""
        self.end_commands()
        for job in self.jobs():
            self.slurm("scancel", job.split()[0])
        wait_for("jobs gone", lambda: not self.jobs(), 60, lambda: str(self.jobs()))


@contextmanager
def own_sandbox(name: str, **sizes: int) -> Iterator[Sandbox]:
    """A sandbox for one module, which may break it; up in half a second."""
    if reason := missing():
        pytest.skip(f"no sandbox: {reason}")
    made = Sandbox.up(f"test-{os.getpid()}-{name}", **sizes)
    try:
        yield made
    finally:
        made.down()
        assert not made.layout.dir.exists()


@contextmanager
def python_for_all() -> Iterator[Path]:
    """A Python that every user may run, with the packages of ours, which may lie where only we may look.

    To be made before the sandbox, whose nodes inherit the mounts.
    """
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    bases = [Path("/usr/bin") / name, Path("/usr/local/bin") / name, Path(sys.executable).resolve()]
    base = next((path for path in bases if _may_run(path)), None)
    if base is None:
        pytest.skip(f"no {name} that another user may run: apt-get install {name}")
    place = Path(tempfile.mkdtemp(prefix="raylaunch-test-", dir="/var/tmp"))
    place.chmod(0o755)
    parts = {"checkout": Path(raylaunch.__file__).parents[1], "packages": Path(sysconfig.get_path("purelib"))}
    own = place / "lib" / name / "site-packages"
    for path in (place / "bin", own, *(place / part for part in parts)):
        path.mkdir(parents=True)
    (place / "bin" / "python").symlink_to(base)
    (place / "pyvenv.cfg").write_text(f"home = {base.parent}\n")
    (own / "ours.pth").write_text("".join(f"{place / part}\n" for part in parts))
    try:
        for part, path in parts.items():
            subprocess.run(["mount", "--bind", "-o", "ro", str(path), str(place / part)], check=True)
        yield place / "bin" / "python"
    finally:
        for part in parts:
            subprocess.run(["umount", str(place / part)], check=True)
            (place / part).rmdir()  # which an empty directory alone allows: only then remove the rest
        shutil.rmtree(place)


def _may_run(python: Path) -> bool:
    try:
        done = subprocess.run(
            [python, "-c", "import json, ssl"], user=NOBODY, group=NOBODY, extra_groups=[], cwd="/",
            env={"PATH": os.defpath}, capture_output=True, check=False,
        )  # fmt: skip
    except OSError:
        return False
    return done.returncode == 0


@contextmanager
def mounted(path: Path, size: str, *options: str) -> Iterator[Path]:
    """A small file system of its own at `path`."""
    with _mount(path, "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "raylaunch-test"):
        yield path


@contextmanager
def disk_at(path: Path, mib: int) -> Iterator[Path]:
    """A small disk of its own at `path`, which fsfreeze can stop."""
    image = path.with_suffix(".img")
    with image.open("wb") as out:
        out.truncate(mib << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        with _mount(path, "-o", "loop", str(image)):
            yield path
    finally:
        image.unlink()


@contextmanager
def _mount(path: Path, *what: str) -> Iterator[None]:
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *what, str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)
        shutil.rmtree(path)


def write_texts(directory: Path) -> Path:
    """Three small files of text that a model can learn something from; always the same."""
    directory.mkdir()
    source = random.Random(0)
    letters = "abcdefghij"
    words = ["".join(source.choice(letters) for _ in range(source.randint(2, 8))) for _ in range(200)]
    for number in range(3):
        lines = (" ".join(source.choice(words) for _ in range(12)) for _ in range(300))
        (directory / f"{number}.txt").write_text("\n".join(lines))
    return directory


def small_training(text: Path, **steps: int) -> dict[str, Any]:
    """A config; `steps`: more of its step_scheduler. Ten samples a step, one a pass: three workers share them unevenly,
    and steps are slow enough to hit."""
    return {
        "model": {"size": "tiny"},
        "data": {"text": [str(text)], "seq_len": 64},
        "step_scheduler": {"global_batch_size": 10, "local_batch_size": 1, **steps},
    }


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The config with `changes`: of a section, only the keys that are named."""
    sections = {
        name: {**config.get(name, {}), **value} if isinstance(value, dict) else value for name, value in changes.items()
    }
    return {**config, **sections}


def same_curve(one: Mapping[int, float], other: Mapping[int, float], relative: float = 1e-4) -> None:
    """Both have the same steps, and losses that differ by floating-point order alone."""
    assert list(one) == sorted(one) and one.keys() == other.keys()
    for step, loss in one.items():  # not the worst alone: there is none among numbers that are no numbers
        assert abs(loss - other[step]) <= relative * abs(other[step]), (step, loss, other[step])
