"""The process that answers Prometheus, and who keeps it running: no client and no storage makes it fail."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylaunch.cluster.head import metrics_process
from raylaunch.observe.prometheus import exporter


@pytest.fixture
def server(tmp_path: Path) -> Iterator[exporter.MetricsServer]:
    cluster = tmp_path / "clusters" / "c"
    cluster.mkdir(parents=True)
    with exporter.MetricsServer(cluster, "127.0.0.1", 0) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def answer(server: exporter.MetricsServer, request: bytes) -> bytes:
    with socket.create_connection(server.server_address[:2], timeout=60) as client:  # type: ignore[arg-type]
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return client.makefile("rb").read()


@pytest.mark.parametrize(
    "given", [b"", b"Bearer", b"Bearer h\xe9llo", b"\xff\xfe\x00", b"Bearer \xed\xa0\x80", b"Basic " + b"x" * 9000]
)
def test_only_the_token_opens_it(
    server: exporter.MetricsServer, given: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    said = answer(server, b"GET /metrics HTTP/1.0\r\nAuthorization: " + given + b"\r\n\r\n")
    assert b" 401 " in said.splitlines()[0]
    assert capfd.readouterr().err == ""


def test_whoever_knows_the_token_is_answered(server: exporter.MetricsServer) -> None:
    token = exporter.token(server.state_dir).encode()
    assert (
        b" 200 "
        in answer(server, b"GET /metrics HTTP/1.0\r\nAuthorization: Bearer " + token + b"\r\n\r\n").splitlines()[0]
    )


@pytest.mark.parametrize(
    "request_",
    [
        b"\xff\xff\r\n\r\n",
        b"GET\r\n\r\n",
        b"x" * 70_000 + b"\r\n\r\n",
        b"GET /metrics HTTP/1.0\r\n" + b"A: 1\r\n" * 200 + b"\r\n",
    ],
)
def test_what_is_no_request_is_refused(
    server: exporter.MetricsServer, request_: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    assert b"Error response" in answer(server, request_)
    assert capfd.readouterr().err == ""


def test_a_failure_is_one_line(
    server: exporter.MetricsServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """The storage does not answer, say."""
    (server.state_dir / exporter.TOKEN_FILE).unlink()
    (server.state_dir / exporter.TOKEN_FILE).mkdir()
    answer(server, b"GET /metrics HTTP/1.0\r\n\r\n")
    (record,) = caplog.records
    assert "a request failed" in record.getMessage() and record.exc_info is None and record.levelno == logging.WARNING
    assert "Traceback" not in capfd.readouterr().err


def test_a_log_that_cannot_be_opened_is_no_end_of_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again, and again."""
    monkeypatch.setattr(metrics_process, "AGAIN_AFTER", 0.0)

    async def main() -> None:
        keeping = asyncio.create_task(metrics_process.keep(tmp_path / "nowhere", "127.0.0.1", 1, {}))
        async with asyncio.timeout(60):
            while len(caplog.records) < 2:
                await asyncio.sleep(0)
        assert not keeping.done()
        keeping.cancel()

    asyncio.run(main())
