"""A minimal FSDP2 training loop as one writes it by hand: the peer of `trainers.fsdp`.

    torchrun --nproc-per-node 2 -m benchmarks.bare_fsdp DIR

Only the model is ours. DIR has `config.json` (as `recovery_worker` reads it) and `tokens.bin`, uint16; a line
a step goes into DIR/metrics.jsonl. No checkpoints, no validation, nothing that survives anything.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from raylaunch.config.schema import Config
from raylaunch.trainers.decoder import Decoder


def main() -> None:
    directory = Path(sys.argv[1])
    config = Config.model_validate(json.loads((directory / "config.json").read_text()))
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    seq, steps = config.data.seq_len, config.step_scheduler
    mine = (steps.global_batch_size or 1) // world
    tokens = np.memmap(directory / "tokens.bin", dtype=np.uint16, mode="r")

    model = Decoder(config.model)
    model.settle(seq, torch.device("cpu"))
    for block in model.layers:
        fully_shard(block, reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, fused=True)
    order = np.random.default_rng(0).permutation((len(tokens) - 1) // seq)

    with (directory / "metrics.jsonl").open("w") as out:
        for step in range(steps.max_steps):
            total = 0.0
            passes = mine // steps.local_batch_size
            for number in range(passes):
                first = (step * world + rank) * mine + number * steps.local_batch_size
                picked = order[first % len(order) :][: steps.local_batch_size]
                rows = np.stack([tokens[i * seq : i * seq + seq + 1] for i in picked]).astype(np.int64)
                batch = torch.from_numpy(rows)
                model.set_requires_gradient_sync(number == passes - 1)
                logits = model(batch[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) / passes
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0:
                print(json.dumps({"step": step + 1, "loss": total, "time": time.time()}), file=out, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
