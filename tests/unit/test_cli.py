"""What commands say and refuse, where neither a cluster nor a run is needed for it."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from raylaunch.cli import cli, main, options
from raylaunch.cli.train import _Lines
from raylaunch.cluster import up
from raylaunch.config import loader
from raylaunch.config.schema import Config
from raylaunch.errors import BringUpError, RaylaunchError, SlurmUnavailable, UsageError
from raylaunch.host import locks
from raylaunch.observe import follow_run
from raylaunch.scheduler import backends
from raylaunch.scheduler.backends import Job
from raylaunch.scheduler.slurm.client import Completed, Slurm
from raylaunch.state import files, records, runs
from raylaunch.state.head_state import HeadState
from raylaunch.state.records import Cluster

train_module = sys.modules[_Lines.__module__]  # the package has a command of that name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory, the default of a user without a configuration."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("RAYLAUNCH_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("{}")
    return tmp_path / "state"


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


def refused(*words: str) -> UsageError:
    error = call(*words).exception
    assert isinstance(error, UsageError), error
    return error


class Queue:
    """A Slurm with one job, which is what `looks` says, one after the other; the last one stays."""

    name = "slurm"

    def __init__(self, *looks: Job | RaylaunchError) -> None:
        self.looks, self.cancelled = list(looks), False

    def submit(self, directory: Path, cluster: Cluster, script: str) -> str:
        return "7"

    def states(self, directory: Path, ids: Sequence[str]) -> dict[str, Job]:
        now = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(now, RaylaunchError):
            raise now
        return {} if self.cancelled else {"7": now}

    def cancel(self, directory: Path, ids: Sequence[str]) -> None:
        self.cancelled = True


def pending(reason: str, blocked: str = "") -> Job:
    return Job("7", "PENDING", True, reason, blocked=blocked)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "JOBS_EVERY", (0.0, 0.0))
    monkeypatch.setattr(up, "REASON_LIMIT", 0.2)


def test_a_submitted_job_that_waiting_does_not_start_is_given_back(
    here: Path, quickly: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue(pending(""), pending("PartitionNodeLimit", "lower slurm.nodes"))
    monkeypatch.setattr(backends, "of", lambda name: queue)
    done = call("submit", "c.yaml", "--run", "r", "--nodes", "9")
    assert isinstance(done.exception, BringUpError) and done.exception.exit_code == 1 and not done.stdout
    assert done.exception.message == "job 7 cannot start as submitted (PartitionNodeLimit): lower slurm.nodes"
    assert queue.cancelled and not (here / "runs" / "r").exists() and not (here / "clusters" / "r").exists()


@pytest.mark.parametrize(
    "looks", [[pending(""), pending("Priority")], [Job("7", "RUNNING", True)], [SlurmUnavailable("it is silent")]]
)
def test_a_submitted_job_that_may_start_stays(
    here: Path, quickly: None, monkeypatch: pytest.MonkeyPatch, looks: list[Job | RaylaunchError]
) -> None:
    queue = Queue(*looks)
    monkeypatch.setattr(backends, "of", lambda name: queue)
    assert call("submit", "c.yaml", "--run", "r").stdout == "7\n"
    assert not queue.cancelled and (here / "runs" / "r").exists()


def made_cluster(here: Path, name: str, config: Config) -> tuple[Path, Cluster]:
    directory = files.make_dir(files.cluster_dir(here, name))
    record = Cluster(name, "local", 1, "c", 0.0, 1, config.max_nodes, 1, ("7",))
    record.write(directory / records.CLUSTER_FILE)
    files.write_text(directory / records.CONFIG_FILE, loader.dump(config))
    return directory, record


def test_more_nodes_than_the_cluster_was_brought_up_for(here: Path) -> None:
    made_cluster(here, "main", options.load(None, [], {"slurm__nodes": "3"}))
    error = refused("scale", "main", "4")
    assert "above the maximum of 3" in error.message and "raylaunch down main" in error.hint
    again = error.hint.partition("again with --nodes ")[2].partition(";")[0]
    assert options.load(None, [], {"slurm__nodes": again}).max_nodes == 4


def test_a_queued_run_says_behind_which_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, record = made_cluster(here, "main", Config())
    for name in ("first", "second", "third"):
        with runs.prepared(files.run_dir(here, name), Config(), "main"):
            pass

    def said(name: str, running: str, *queue: str) -> str:
        HeadState(record.canary, list(queue), running).write(directory / records.DUTIES_FILE)
        _Lines(1).take(next(follow_run.follow(files.run_dir(here, name), directory)))
        return capsys.readouterr().err

    assert said("second", "first", "second") == "run second is queued behind run first\n"
    assert said("third", "first", "second", "third") == "run third is queued behind runs first, second\n"
    assert said("third", "first", "second") == "run third is queued behind runs first, second\n"  # not yet taken
    assert said("first", "first", "second") == said("first", "", "first") == "run first is queued\n"


def test_the_logs_of_an_earlier_attempt(here: Path) -> None:
    run = files.run_dir(here, "r")
    with runs.prepared(run, Config(), "main") as record:
        record.save(run, attempt=2)
    for attempt in (1, 2):
        folder = files.make_dir(files.attempt_dir(run, attempt))
        (folder / "rank-0.log").write_text(f"of attempt {attempt}\n")
    (run / records.LOGS / "driver.log").write_text("of the driver\n")
    assert call("logs", "r").output == "driver: of the driver\nrank-0: of attempt 2\n"
    assert call("logs", "r", "--attempt", "1").output == "of attempt 1\n"
    assert call("logs", "r", "--attempt", "1", "--rank", "0").output == "of attempt 1\n"
    assert "attempt 3" in refused("logs", "r", "--attempt", "3").message
    assert refused("logs", "r", "--attempt", "3").hint == "Available: 1, 2."
    made_cluster(here, "main", Config())
    assert "--attempt belongs to a run" in refused("logs", "main", "--attempt", "1").message


def test_check_looks_at_the_runs_name(here: Path) -> None:
    assert "--run a/b" in refused("train", "c.yaml", "--check", "--run", "a/b").message


def test_help_needs_no_run(here: Path) -> None:
    for command in ("ls", "verify", "gc", "export"):
        shown = call("checkpoints", "nope", command, "--help")
        assert shown.exit_code == 0 and f"{command} [OPTIONS]" in shown.output
    assert "no run nope" in refused("checkpoints", "nope", "verify").message
    assert "no run nope" in refused("checkpoints", "nope").message


def test_a_command_that_is_nearly_one() -> None:
    shown = call("trian", "c.yaml")
    assert shown.exit_code == 2 and "Did you mean train?" in shown.output
    assert "Did you mean" not in call("xyz").output


def test_watching_what_is_not_there(here: Path) -> None:
    assert refused("watch", "nope", "--once").message.startswith("no run or cluster nope")


def test_the_doctor_tells_missing_commands_from_a_missing_configuration(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(self: Slurm, command: Sequence[str], *more: object) -> Completed:
        raise error

    def finding() -> str:
        shown = call("doctor", "--json")
        return next(str(row["text"]) for row in json.loads(shown.stdout) if row["check"] == "slurm.version")

    monkeypatch.setattr(Slurm, "_call", answer)
    error = SlurmUnavailable("`sbatch --version` cannot reach Slurm: Could not establish a configuration source")
    assert "are installed, but find no configuration" in finding()
    error.__cause__ = FileNotFoundError(2, "No such file or directory")
    assert finding() == "Slurm's commands are not installed"


@pytest.mark.parametrize("kind", ["train", "submit"])
def test_two_that_hand_one_run_over_at_once_start_it_once(
    here: Path, quickly: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The second comes when the first has looked, and written nothing yet: it waits, then finds the run alive."""
    monkeypatch.setattr(backends, "of", lambda name: Queue(Job("7", "RUNNING", True)))
    directory, _ = made_cluster(here, "main", Config())
    files.make_dir(directory / records.REQUESTS)
    first, second = (("submit", "c.yaml", "--run", "r", "--name", f"own{i}") for i in (1, 2))
    if kind == "train":
        first = second = ("train", "c.yaml", "--run", "r", "--detach")
    looked, answers = threading.Event(), []
    refuse, held = train_module._refuse_living, locks.held

    def look(where: Path, run_dir: Path) -> None:
        refuse(where, run_dir)
        if not looked.is_set():
            looked.set()
            other.start()
            waits.wait(10)

    def hold(path: Path, patience: float = 0.0) -> AbstractContextManager[bool]:
        if looked.is_set():
            waits.set()
        return held(path, patience)

    waits = threading.Event()
    monkeypatch.setattr(train_module, "_refuse_living", look)
    monkeypatch.setattr(locks, "held", hold)
    other = threading.Thread(target=lambda: answers.append(CliRunner().invoke(cli, second)))
    answers.append(call(*first))
    other.join(20)
    assert answers[0].exit_code == 0, answers[0].output
    assert isinstance(answers[1].exception, UsageError) and "run r is queued" in answers[1].exception.message
    asked = list((directory / records.REQUESTS).glob("*-run-*"))
    assert len(asked) == (kind == "train") and not (here / "clusters" / "own2").exists()


def test_a_lock_of_a_frozen_hand_over_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "HAND_OVER_LIMIT", 0.0)
    run = files.run_dir(here, "r")
    with runs.handing_over(run), pytest.raises(RaylaunchError, match="submitting a run"), runs.handing_over(run):
        pass


def test_a_name_that_is_no_text_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(cli, "main", lambda **_: print("node \udcff", flush=True))
        with pytest.raises(SystemExit) as end:
            main()
    out.seek(0)
    assert end.value.code == 0 and out.read() == "node \\udcff\n"
