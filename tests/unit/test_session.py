"""What a trainer sees: reports reach the file, a stop is heard, whatever happens to the files; no thread dies silently."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import until

from raylaunch.host import threads
from raylaunch.state import appender, event_log, files, runs, thread_deaths
from raylaunch.training.stop_request import NOW
from raylaunch.training.worker import session
from raylaunch.training.worker.session import Session

pytestmark = pytest.mark.filterwarnings("error")  # a thread that dies is one


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appender, "RETRY_EVERY", 0.01)
    monkeypatch.setattr(session, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(session, "CLOSE_LIMIT", 0.1)


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Threads that died; none may."""
    names: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda died: names.append(repr(died.exc_value)))
    yield names
    assert not names


def of_rank(rank: int, run: Path) -> Session:
    return Session("r", run, run / "checkpoints", 1, rank, 2, 0, 1, "n", "cpu", 4)


@pytest.fixture
def rank_0(tmp_path: Path) -> Iterator[Session]:
    made = of_rank(0, tmp_path)
    yield made
    made.close()


def test_reports_are_lines_in_their_order(rank_0: Session, tmp_path: Path) -> None:
    rank_0.start()
    for step in range(200):
        rank_0.report(step=step, loss=math.nan)
    rank_0.close()
    rows = files.read_lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(200))
    assert rows[0]["loss"] == "nan" and rows[0]["attempt"] == 1 and rows[0]["world_size"] == 2


def test_other_ranks_report_nothing_and_hear_no_stop(tmp_path: Path) -> None:
    rank_1 = of_rank(1, tmp_path)
    runs.request_stop(tmp_path, "test")
    rank_1.start()
    rank_1.report(step=1)
    rank_1.close()
    assert rank_1.stop_requested() == 0 and not (tmp_path / "metrics.jsonl").exists()


def test_a_value_that_is_no_json_is_an_error_of_the_trainer_s_own_call(
    rank_0: Session, tmp_path: Path, dead: list[str]
) -> None:
    rank_0.start()
    with pytest.raises(TypeError):
        rank_0.report(step=1, what=object())
    changed_later: list[object] = [1]
    rank_0.report(step=2, what=changed_later)
    changed_later.append(object())
    rank_0.report(step=3)
    runs.request_stop(tmp_path, "test")
    until(lambda: rank_0.stop_requested() == NOW)
    rank_0.close()
    assert [row["step"] for row in files.read_lines(tmp_path / "metrics.jsonl")] == [2, 3]


def test_a_stop_is_heard_where_the_metrics_file_cannot_be_opened(
    rank_0: Session, tmp_path: Path, dead: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    rank_0.start()
    rank_0.report(step=1)
    until(lambda: "is kept, and tried again" in capsys.readouterr().err)
    runs.request_stop(tmp_path, "test")
    until(lambda: rank_0.stop_requested() == NOW)
    rank_0.close()
    assert "1 lines of" in capsys.readouterr().err


def test_the_step_record_has_no_hole_when_the_file_is_back(
    rank_0: Session, tmp_path: Path, dead: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.mkdir()
    rank_0.start()
    for step in range(5):
        rank_0.report(step=step)
    until(lambda: "is kept, and tried again" in capsys.readouterr().err)
    path.rmdir()
    rank_0.report(step=5)
    until(lambda: len(files.read_lines(path)) == 6 if path.is_file() else False)
    rank_0.close()
    assert [row["step"] for row in files.read_lines(path)] == list(range(6))


def test_a_stop_is_heard_while_a_write_does_not_return(
    rank_0: Session, tmp_path: Path, dead: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stalls, back, real = threading.Event(), threading.Event(), files.append

    def stalled(path: Path, data: bytes) -> int:
        stalls.set()
        assert back.wait(30)
        return real(path, data)

    monkeypatch.setattr(files, "append", stalled)
    rank_0.start()
    rank_0.report(step=1)
    until(stalls.is_set)
    runs.request_stop(tmp_path, "test")
    until(lambda: rank_0.stop_requested() == NOW)
    rank_0.close()  # does not wait for it either
    back.set()
    rank_0._metrics._thread.join()


@pytest.mark.parametrize("trouble", ["unreadable", "no text"])
def test_a_stop_is_heard_once_its_file_can_be_read(
    rank_0: Session, tmp_path: Path, dead: list[str], capsys: pytest.CaptureFixture[str], trouble: str
) -> None:
    stop = tmp_path / files.STOP_FILE
    if trouble == "unreadable":
        stop.mkdir()
    else:
        stop.write_bytes(b"\xff\xfe")
    rank_0.start()
    until(lambda: "cannot look for a stop request" in capsys.readouterr().err)
    assert rank_0.stop_requested() == 0
    if trouble == "unreadable":
        stop.rmdir()
    runs.request_stop(tmp_path, "test")
    until(lambda: rank_0.stop_requested() == NOW)


def test_a_thread_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    printed, told = list[str](), list[tuple[str, str]]()
    monkeypatch.setattr(threading, "excepthook", lambda died: printed.append(str(died.exc_value)))
    threads.on_death(lambda thread, error: told.append((thread, error)))

    def work(error: BaseException) -> None:
        raise error

    for error in (ValueError("no number"), SystemExit(1)):
        thread = threading.Thread(target=work, args=(error,), name="worker")
        thread.start()
        thread.join()
    assert told == [("worker", "ValueError: no number")] and printed[0] == "no number"


def test_a_thread_that_dies_is_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda died: None)
    thread_deaths.record(tmp_path, attempt=4, rank=3)
    thread = threading.Thread(target=lambda: [][0], name="pulse")
    thread.start()
    thread.join()
    (event,) = event_log.read(tmp_path, "thread_died")
    assert (event["attempt"], event["rank"], event["thread"]) == (4, 3, "pulse") and "IndexError" in event["error"]
