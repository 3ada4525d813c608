"""`raylaunch metrics export`: clusters into a Prometheus and a Grafana of one's own."""

from __future__ import annotations

import time
from pathlib import Path

import click

from raylaunch.cli import options
from raylaunch.cli.show import note
from raylaunch.observe.prometheus import scrape_config
from raylaunch.observe.prometheus.exporter import TOKEN_FILE


@click.group()
def metrics() -> None:
    """Export metrics of clusters and runs to Prometheus and Grafana."""


@metrics.command()
@click.option("--dir", "out", type=click.Path(path_type=Path), required=True, help="Output directory.")
@click.option(
    "--every", type=click.FloatRange(min=1), help="Keep running, and rewrite the targets at this interval in seconds."
)
@options.state_dir_option
def export(out: Path, every: float | None, state_dir: Path | None) -> None:
    """Write the configuration for Prometheus and Grafana: targets (file_sd) of all running clusters, a scrape
    configuration, and dashboards for raylaunch and Ray."""
    where = options.state_dir(state_dir)
    for name in scrape_config.write(where, out):
        click.echo(str(out / name))
    note(f"Prometheus must be able to read {where / TOKEN_FILE} (0600, yours), or a copy that you make for it.")
    while every is not None:
        time.sleep(every)
        scrape_config.write_targets(where, out)
