"""A DDP script as people write it for torchrun: env:// rendezvous, a snapshot every so often, resume from it.

torchrun --nproc-per-node 2 ddp.py --dir /tmp/ddp
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def spirals(count: int = 6000) -> TensorDataset:
    """Three arms of points, each a class."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(count) % 3
    radius = torch.rand(count, generator=generator)
    angle = radius * 5 + label * 2 * torch.pi / 3 + 0.2 * torch.randn(count, generator=generator)
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), label)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--epochs", type=int, default=20)
    options.add_argument("--dir", type=Path, default=Path(os.environ.get("RAYLAUNCH_CHECKPOINT_DIR", ".")))
    args = options.parse_args()

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, local_rank = dist.get_rank(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    args.dir.mkdir(parents=True, exist_ok=True)
    snapshot, first = args.dir / "snapshot.pt", 0
    if snapshot.exists():
        saved = torch.load(snapshot, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]
        print(f"rank {rank} of {dist.get_world_size()} goes on from epoch {first}")

    parallel = DistributedDataParallel(model)
    data = spirals()
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=100, sampler=sampler)
    for epoch in range(first, args.epochs):
        sampler.set_epoch(epoch)
        for points, labels in loader:
            loss = nn.functional.cross_entropy(parallel(points.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch + 1} loss {loss.item():.4f}", flush=True)
            part = snapshot.with_suffix(".part")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, part)
            part.replace(snapshot)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
