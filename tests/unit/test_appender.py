"""Appending from a thread: order, storage that stalls, storage that fails."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from stalling import StallingFile

from raylaunch.state.appender import Appender, AppendingHandler

PATIENCE = 60.0


def test_appends_in_order(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"before\n")
    out = Appender(path)
    for number in range(100):
        out.write(b"%d\n" % number)
    out.close(PATIENCE)
    assert path.read_bytes() == b"before\n" + b"".join(b"%d\n" % n for n in range(100))


def test_memory_is_bounded_while_the_storage_stalls() -> None:
    file = StallingFile()
    out = Appender(file.as_path(), room=100)
    out.write(b"first\n")
    assert file.reached.wait(PATIENCE)
    for _ in range(1000):  # returns, though nothing is written
        out.write(b"0123456789")
    assert out._size <= 100 and sum(map(len, out._waiting)) <= 100
    file.free.set()
    out.close(PATIENCE)
    lines = file.content.split(b"\n")
    assert lines[0] == b"first" and b"9910 bytes were dropped" in lines[1]
    assert lines[2] == b"0123456789" * 9


def test_goes_on_after_an_error() -> None:
    file = StallingFile()
    file.error = OSError(errno.ESTALE, "stale file handle")
    out = Appender(file.as_path())
    out.write(b"lost")
    assert file.reached.wait(PATIENCE)
    file.free.set()
    while out._size:
        os.sched_yield()
    file.error = None
    out.write(b"kept\n")
    out.close(PATIENCE)
    assert file.content.endswith(b"kept\n") and b"4 bytes were dropped" in file.content


def test_close_does_not_wait_for_ever() -> None:
    file = StallingFile()
    out = Appender(file.as_path())
    out.write(b"x")
    out.close(0.01)
    out.write(b"too late")
    file.free.set()
    out.close(PATIENCE)
    assert file.content == b"x"


def test_log_records_become_lines() -> None:
    file = StallingFile()
    file.free.set()
    out = Appender(file.as_path())
    log = logging.Logger("test")
    log.addHandler(AppendingHandler(out))
    log.warning("no space on %s", "\udcff")
    out.close(PATIENCE)
    assert file.content == b"no space on ?\n"
