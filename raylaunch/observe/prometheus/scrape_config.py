"""Files for an existing Prometheus and Grafana: targets, scrape configuration, dashboards."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from raylaunch.cluster import up
from raylaunch.errors import RaylaunchError
from raylaunch.host.ports import Ports
from raylaunch.observe.prometheus import exporter
from raylaunch.state import files, members, records
from raylaunch.state.records import Cluster

TARGETS, RAY_TARGETS, SCRAPE, DASHBOARD, RAY_DASHBOARD = (
    "raylaunch-targets.json", "ray-targets.json", "prometheus.yml", "grafana-raylaunch.json", "grafana-ray.json",
)  # fmt: skip
_RAY = (
    "from ray.dashboard.modules.metrics.grafana_dashboard_factory import generate_default_grafana_dashboard as make;"
    "print(make()[0])"
)


def targets(state_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """File-based service discovery for running clusters: raylaunch's servers, and Ray's exporters on every node."""
    own, rays = [], []
    for name in up.names(state_dir):
        directory = files.cluster_dir(state_dir, name)
        try:
            record, served = Cluster.read(directory), files.read_json(directory / exporter.ADDRESS_FILE)
            if record is None or served is None or (directory / records.ENDED_FILE).exists():
                continue
            labels = {"cluster": record.name}
            own.append({"targets": [f"{served['address']}:{served['port']}"], "labels": labels})
            at = [
                f"{node.address}:{Ports(node.ports[0]).metrics_export}"
                for node in members.living(directory, record).nodes
                if node.state == "ready" and node.ports is not None
            ]
            rays.append({"targets": sorted(at), "labels": labels})
        except (RaylaunchError, KeyError, TypeError):
            continue  # one that cannot be read must not hide the others
    return own, rays


def write(state_dir: Path, out: Path) -> list[str]:
    """Write all five files; returns their names. The dashboard that Ray cannot create is omitted."""
    own, rays = targets(state_dir)
    files.make_dir(out, 0o755)
    exporter.token(state_dir)
    texts = {
        TARGETS: json.dumps(own, indent=1),
        RAY_TARGETS: json.dumps(rays, indent=1),
        SCRAPE: yaml.safe_dump(_scrape(state_dir, out), sort_keys=False),
        DASHBOARD: resources.files("raylaunch.observe.prometheus").joinpath("grafana.json").read_text(),
    }
    rays_own = _rays_dashboard()
    if rays_own:
        texts[RAY_DASHBOARD] = rays_own
    for name, text in texts.items():
        files.write_text(out / name, text, 0o644)
    return list(texts)


def write_targets(state_dir: Path, out: Path) -> None:
    """Update the two files that change as clusters start and stop; Prometheus reloads them by itself."""
    for name, value in zip((TARGETS, RAY_TARGETS), targets(state_dir), strict=True):
        files.write_text(out / name, json.dumps(value, indent=1), 0o644)


def _scrape(state_dir: Path, out: Path) -> dict[str, Any]:
    token = str((state_dir / exporter.TOKEN_FILE).absolute())

    def job(name: str, file: str) -> dict[str, Any]:
        return {"job_name": name, "file_sd_configs": [{"files": [str((out / file).absolute())]}]}

    raylaunch = {
        **job("raylaunch", TARGETS),
        "authorization": {"type": "Bearer", "credentials_file": token},
        "honor_labels": True,  # its own `cluster` is the target's
    }
    return {"global": {"scrape_interval": "15s"}, "scrape_configs": [raylaunch, job("ray", RAY_TARGETS)]}


def _rays_dashboard() -> str:
    """Ray's default dashboard, created by Ray in a separate process; "" if that fails."""
    try:
        made = subprocess.run(
            [sys.executable, "-P", "-c", _RAY], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return made.stdout
