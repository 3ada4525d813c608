"""Every random number of a step is a function of (seed, step, rank): there is no random state to save,
and a resumed run draws what the uninterrupted one would have drawn. At another world size the draws
differ, as the ranks' shares do."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed all generators that a model may draw from; some 20 µs, and no wait for the device."""
    digest = hashlib.blake2b(f"raylaunch step {seed} {step} {rank}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little")
    # Not torch.manual_seed: that asks every kind of accelerator there is, which takes ten times as long.
    torch.default_generator.manual_seed(value >> 1)
    if device.type == "cuda":
        torch.cuda.manual_seed(value >> 1)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)  # the global one: others' code draws from it
