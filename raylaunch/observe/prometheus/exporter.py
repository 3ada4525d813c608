"""The process next to a cluster's head that serves metrics to Prometheus.

    python -m raylaunch.observe.prometheus.exporter CLUSTER_DIR ADDRESS PORT

GET /metrics requires the token in STATE_DIR/metrics.token (0600, one for all clusters of the state directory, used for
nothing else): `Authorization: Bearer …`. It only reads files: its cost, or a stalled disk, does not affect the head.
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
"""In the cluster directory: address and port of the server."""
SLOW_CLIENT = 10.0
log = logging.getLogger(__name__)


def token(state_dir: Path) -> str:
    """The token of the state directory; created at the first use."""
    path = state_dir / TOKEN_FILE
    if not path.exists():
        files.write_text(path, files.new_token() + "\n")
    return path.read_text().strip()


class MetricsServer(ThreadingHTTPServer):
    """The server of one cluster."""

    daemon_threads = True

    def __init__(self, directory: Path, address: str, port: int) -> None:
        from prometheus_client import CollectorRegistry

        from raylaunch.observe.prometheus.collector import ClusterCollector

        super().__init__((address, port), _Handler)
        self.state_dir = directory.parent.parent
        token(self.state_dir)  # create it for the clients
        self.lock = threading.Lock()
        """An EventReader is not thread-safe."""
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(ClusterCollector(directory))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One line per failure: clients disconnect, and storage does not respond."""
        log.warning("a request failed client=%s error=%r", client_address, sys.exc_info()[1])


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    timeout = SLOW_CLIENT

    def do_GET(self) -> None:
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

        if self.path.partition("?")[0] != "/metrics":
            return self.send_error(404, explain="Only /metrics is available.")
        given = self.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token(self.server.state_dir)}".encode()):
            return self.send_error(401, explain=f"Send the bearer token in {TOKEN_FILE} of the state directory.")
        with self.server.lock:
            body = generate_latest(self.server.registry)
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE_LATEST)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """No log line per scrape."""


def main() -> None:
    processes.die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    directory, address, port = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    server = MetricsServer(directory, address, port)
    files.write_json(directory / ADDRESS_FILE, {"address": address, "port": port, "pid": os.getpid()})
    server.serve_forever()


if __name__ == "__main__":
    main()
