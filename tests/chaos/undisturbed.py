"""The training of the chaos tests, and its losses when nothing happens to it.

These are made by worker processes alone, without a cluster: which losses a run has must not depend on what it runs on.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from attempts import Run, Workers
from helpers import small_training, write_texts

STEPS, EVERY = 80, 5
"""The steps of a run, and those from one commit to the next."""


def config(text: Path) -> dict[str, Any]:
    """Of every run: the model, its data and its steps."""
    return small_training(text, max_steps=STEPS, ckpt_every_steps=EVERY, val_every_steps=0)


@functools.cache
def losses(workers: int) -> Mapping[int, float]:
    """Step → loss, of a run that has so many workers from its beginning to its end."""
    with TemporaryDirectory() as place:
        pool = Workers(Path(place) / "stderr.log")
        try:
            run = Run(Path(place), write_texts(Path(place) / "text"), pool)
            run.config = config(Path(place) / "text")
            samples = run.config["step_scheduler"]["global_batch_size"]
            found = run.train(workers, global_batch_size=samples).metrics("loss")
        finally:
            pool.close()
    assert list(found) == list(range(1, STEPS + 1))
    return found
