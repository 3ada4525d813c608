"""The process beside a cluster's head that answers Prometheus.

    python -m raylaunch.observe.prometheus.exporter CLUSTER_DIR ADDRESS PORT

GET /metrics, for whoever knows STATE_DIR/metrics.token (0600, one for all clusters of the state directory, good for
nothing else): `Authorization: Bearer …`. It reads files only: what it costs, or a disk that stalls, is not the head's.
"""

from __future__ import annotations

import hmac
import logging
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from raylaunch.host import processes
from raylaunch.state import files

TOKEN_FILE = "metrics.token"
ADDRESS_FILE = "metrics.json"
"""In the cluster directory: where it is served."""
SLOW_CLIENT = 10.0
log = logging.getLogger(__name__)


def token(state_dir: Path) -> str:
    """The state directory's; made when it is first asked for."""
    path = state_dir / TOKEN_FILE
    if not path.exists():
        files.write_text(path, files.new_token() + "\n")
    return path.read_text().strip()


class MetricsServer(ThreadingHTTPServer):
    """One cluster's."""

    daemon_threads = True

    def __init__(self, directory: Path, address: str, port: int) -> None:
        from prometheus_client import CollectorRegistry

        from raylaunch.observe.prometheus.collector import ClusterCollector

        super().__init__((address, port), _Handler)
        self.state_dir = directory.parent.parent
        token(self.state_dir)  # so that it is there for whoever is to ask
        self.lock = threading.Lock()
        """A Reader has one reader."""
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(ClusterCollector(directory))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One line a failure: clients go away in the middle, and storage does not answer."""
        log.warning("a request failed client=%s error=%r", client_address, sys.exc_info()[1])


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    timeout = SLOW_CLIENT

    def do_GET(self) -> None:
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

        if self.path.partition("?")[0] != "/metrics":
            return self.send_error(404, explain="There is /metrics.")
        given = self.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token(self.server.state_dir)}".encode()):
            return self.send_error(401, explain=f"Give the bearer token of {TOKEN_FILE} in the state directory.")
        with self.server.lock:
            body = generate_latest(self.server.registry)
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE_LATEST)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A line a scrape would be a large log of nothing."""


def main() -> None:
    processes.die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    directory, address, port = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    server = MetricsServer(directory, address, port)
    files.write_json(directory / ADDRESS_FILE, {"address": address, "port": port, "pid": os.getpid()})
    server.serve_forever()


if __name__ == "__main__":
    main()
