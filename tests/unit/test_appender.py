"""Appending from a thread: order, storage that stalls, storage that fails."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stalling import Storage
from waiting import until

from raylaunch.state import appender, files
from raylaunch.state.appender import Appender, AppendingHandler

PATIENCE = 60.0


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    made = Storage()
    monkeypatch.setattr(files, "append", made.append)
    monkeypatch.setattr(appender, "RETRY_EVERY", 0.001)
    yield made
    made.free.set()


def started(room: int = 1 << 20, is_log: bool = False) -> Appender:
    out = Appender(Path("log"), room, is_log)
    out.start()
    return out


def test_appends_in_order(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"before\n")
    out = Appender(path)
    out.start()
    for number in range(100):
        out.write(b"%d\n" % number)
    assert out.close(PATIENCE) == 0
    assert path.read_bytes() == b"before\n" + b"".join(b"%d\n" % n for n in range(100))


def test_a_write_that_is_cut_off_goes_on_where_it_ended(storage: Storage) -> None:
    storage.most = [3, 0]
    out = started()
    for step in range(3):
        out.write(b"step %d\n" % step)
    assert out.close(PATIENCE) == 0 and storage.content == b"step 0\nstep 1\nstep 2\n"


@pytest.mark.parametrize("is_log", [False, True])
def test_memory_is_bounded_while_the_storage_stalls_and_the_oldest_go(
    storage: Storage, capsys: pytest.CaptureFixture[str], is_log: bool
) -> None:
    storage.free.clear()
    out = started(room=100, is_log=is_log)
    out.write(b"first\n")
    assert storage.reached.wait(PATIENCE)
    for number in range(1000):  # returns, though nothing is written
        out.write(b"%09d\n" % number)
    assert out._size <= 100
    storage.free.set()
    lost = out.close(PATIENCE)
    first, *rest = storage.content.decode().splitlines()
    assert first == "first" and rest[-9:] == [f"{number:09d}" for number in range(991, 1000)]
    if is_log:
        assert (lost, rest[0]) == (0, "[raylaunch: 991 lines are lost: the storage did not accept them]")
    else:
        assert lost == 991 and len(rest) == 9 and "991 lines of log are lost" in capsys.readouterr().err


def test_what_failed_is_tried_again_and_said_once(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    storage.trouble = "cannot append to log: Stale file handle"
    out = started()
    out.write(b"one\n")
    until(lambda: out._failure != "")
    out.write(b"two\n")
    storage.trouble = ""
    assert out.close(PATIENCE) == 0 and storage.content == b"one\ntwo\n"
    assert capsys.readouterr().err.count("Stale file handle") == 1


def test_the_oldest_go_while_the_storage_fails(storage: Storage) -> None:
    storage.trouble = "cannot append to log: Stale file handle"
    out = started(room=100)
    out.write(b"first\n")
    until(lambda: out._failure != "")
    for number in range(100):
        out.write(b"%09d\n" % number)
        time.sleep(0.001)
    storage.trouble = ""
    assert out.close(PATIENCE) == 91
    assert storage.content == b"first\n" + b"".join(b"%09d\n" % number for number in range(91, 100))


def test_a_stderr_that_fails_too_ends_nothing(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    storage.trouble = "cannot append to log: No space left on device"
    out = started()
    out.write(b"one\n")
    until(lambda: out._failure != "")
    storage.trouble = ""
    out.write(b"two\n")
    assert out.close(PATIENCE) == 0 and storage.content == b"one\ntwo\n"


def test_close_does_not_wait_for_ever(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    storage.free.clear()
    out = started()
    out.write(b"x\n")
    assert storage.reached.wait(PATIENCE)
    assert out.close(0.01) == 1
    out.write(b"too late\n")
    storage.free.set()
    assert out.close(PATIENCE) == 1 and storage.content == b"x\n"


def test_it_ends_by_itself_when_all_is_written(storage: Storage) -> None:
    out = started()
    out.write(b"x\n")
    out.end()
    out._thread.join(PATIENCE)
    assert not out._thread.is_alive() and storage.content == b"x\n"


def test_log_records_become_lines(storage: Storage) -> None:
    out = started(is_log=True)
    log = logging.Logger("test")
    log.addHandler(AppendingHandler(out))
    log.warning("no space on %s", "\udcff")
    out.close(PATIENCE)
    assert storage.content == b"no space on ?\n"
