"""An FSDP2 script as people write it for torchrun, with sharded checkpoints that load at any number of workers.

    torchrun --nproc-per-node 2 fsdp2.py --dir /tmp/fsdp2

It saves when it is told to end (SIGTERM), so that nothing is lost when its nodes are wanted back.
"""

import argparse
import os
import shutil
import signal
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--save-every", type=int, default=100)
    options.add_argument("--dir", type=Path, default=Path(os.environ.get("RAYLAUNCH_CHECKPOINT_DIR", ".")))
    args = options.parse_args()

    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world, local_rank = dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")

    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()).to(device) for _ in range(4)]
    model = nn.Sequential(*layers, nn.Linear(64, 1).to(device))
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    args.dir.mkdir(parents=True, exist_ok=True)
    done = sorted(int(p.name.removeprefix("step-")) for p in args.dir.glob("step-*[0-9]"))
    step = done[-1] if done else 0
    if step:
        parts, states = get_state_dict(model, optimizer)
        state = {"model": parts, "optimizer": states}
        dcp.load(state, checkpoint_id=args.dir / f"step-{step}")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        print(f"rank {rank} of {world} goes on from step {step}")

    def save() -> None:
        part = args.dir / f"step-{step}.part"
        parts, states = get_state_dict(model, optimizer)
        dcp.save({"model": parts, "optimizer": states}, checkpoint_id=part)
        if rank == 0:
            part.rename(args.dir / f"step-{step}")
            for old in sorted(args.dir.glob("step-*[0-9]"), key=lambda p: p.stat().st_mtime)[:-2]:
                shutil.rmtree(old)

    while step < args.steps:
        # The same 96 samples a step, whatever the number of workers.
        samples = torch.randn(96, 64, generator=torch.Generator().manual_seed(step))[rank::world].to(device)
        loss = (model(samples) - samples.sin().sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if rank == 0 and step % 20 == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
        ends = torch.tensor(float(bool(told)), device=device)
        dist.all_reduce(ends)  # all of them save at the same step
        if ends or step % args.save_every == 0:
            save()
        if ends:
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
