"""Data that lies elsewhere: input, and the shards that training reads, behind an HTTP server with ranges."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from attempts import Run, assert_same_curve, prepared

from raylaunch.data import dataset, prepare, storage
from raylaunch.data.prepare import PrepareRequest
from raylaunch.errors import DataError


class Server:
    """Serves a directory; `asked`: (path, bytes given) of each answer; `refuse`: so many requests get a 503 first."""

    def __init__(self, directory: Path) -> None:
        self.asked: list[tuple[str, int]] = []
        self.refuse = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = directory / self.path.lstrip("/")
                if outer.refuse:
                    outer.refuse -= 1
                    return self.send_error(503)
                if not path.is_file():
                    return self.send_error(404)
                data = path.read_bytes()
                found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                start, stop = (int(found[1]), int(found[2] or len(data) - 1) + 1) if found else (0, len(data))
                part = data[start:stop]
                self.send_response(206 if found else 200)
                self.send_header("Content-Length", str(len(part)))
                self.send_header("Accept-Ranges", "bytes")
                if found:
                    self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(part)
                    outer.asked.append((path.name, len(part)))
                return None

            def log_message(self, *_: object) -> None:
                """pytest shows what matters."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    made = Server(tmp_path / "served")
    yield made
    made.close()


@pytest.mark.long
def test_training_reads_shards_at_a_url_as_if_they_were_here(
    run: Run, straight: Run, server: Server, text: Path, tmp_path: Path
) -> None:
    prepared(text, tmp_path / "served" / "out", piece_bytes=5000)
    run.config["data"] = {"prepared": f"{server.url}/out", "seq_len": 32, "val_fraction": 0.1}
    run.train(2, stop_at=4).train(3)
    assert_same_curve(run, straight)
    windows = [size for name, size in server.asked if re.fullmatch(r"shard-\d+\.arrow", name) and size <= 66]
    assert len(windows) > 10 * 8 * 0.9  # each sample by itself (or two parts of it), and little else


def test_a_read_is_tried_again_and_what_is_not_there_is_said(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    (tmp_path / "a.txt").write_text("what is here is there")
    prepared(tmp_path / "a.txt", tmp_path / "served" / "out")
    url = f"{server.url}/out"
    row = dataset.row(url, dataset.read(url).shards)
    assert bytes(row.read(5, 2).astype("u1")) == b"is"
    server.refuse = 3
    assert bytes(row.read(8, 4).astype("u1")) == b"here"
    server.refuse = 99
    with pytest.raises(DataError, match="cannot read http"):
        row.read(0, 4)
    server.refuse = 0
    with pytest.raises(DataError, match="holds no prepared dataset"):
        dataset.read(f"{server.url}/none")
    with pytest.raises(DataError, match="cannot"):
        dataset.read("nonesuch://there/is")


def test_input_at_a_url_is_the_same_documents(server: Server, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(300))
    (tmp_path / "served" / "in.jsonl").write_text(rows)
    here, there = tmp_path / "here", tmp_path / "there"
    for out, name in ((here, str(tmp_path / "served" / "in.jsonl")), (there, f"{server.url}/in.jsonl")):
        prepare.prepare(PrepareRequest([name], out, piece_bytes=1000), 1, lambda _: None)
    assert dataset.read(here).digest == dataset.read(there).digest
    with pytest.raises(DataError, match=r"nothing matches|cannot read"):
        prepare.prepare(PrepareRequest([f"{server.url}/nothing.jsonl"], tmp_path / "no"), 1, lambda _: None)
