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
from helpers import write_texts

STEPS, EVERY = 80, 5
"""The steps of a run, and those from one commit to the next."""
SAMPLES = 10
"""Of a step, one a pass: three workers share them unevenly, and steps are slow enough to hit."""


def config(text: Path) -> dict[str, Any]:
    """Of every run: the model, its data and its steps."""
    return {
        "model": {"size": "tiny"},
        "data": {"text": [str(text)], "seq_len": 64},
        "step_scheduler": {
            "max_steps": STEPS, "global_batch_size": SAMPLES, "local_batch_size": 1,
            "ckpt_every_steps": EVERY, "val_every_steps": 0,
        },
    }  # fmt: skip


@functools.cache
def losses(workers: int) -> Mapping[int, float]:
    """Step → loss, of a run that has so many workers from its beginning to its end."""
    with TemporaryDirectory() as place:
        pool = Workers(Path(place) / "stderr.log")
        try:
            run = Run(Path(place), write_texts(Path(place) / "text"), pool)
            run.config = config(Path(place) / "text")
            found = run.train(workers, global_batch_size=SAMPLES).metrics("loss")
        finally:
            pool.close()
    assert list(found) == list(range(1, STEPS + 1))
    return found
