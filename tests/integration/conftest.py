"""Fixtures of the trainer's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from attempts import Run, Workers


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    pool = Workers(tmp_path_factory.mktemp("workers") / "stderr.log")
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20 kB of English-like text, fewer samples than the runs read: they cross epochs."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} bottles of beer on the wall, {i * i % 97} to go.\n" for i in range(400)))
    return path


@pytest.fixture
def run(tmp_path: Path, text: Path, workers: Workers) -> Run:
    return Run(tmp_path, text, workers)


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, text: Path, workers: Workers) -> Run:
    """Ten steps at two workers, without a break: what the others are compared with."""
    return Run(tmp_path_factory.mktemp("straight"), text, workers).train(2)
