import argparse
import json
import logging
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

log = logging.getLogger("pretrain")


class Shard(Dataset):
    def __init__(self, folder, rank, vocab):
        self.rows = (Path(folder) / f"shard-{rank}.jsonl").read_text().splitlines()
        self.vocab = vocab

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = json.loads(self.rows[index])
        ids = [ord(letter) % self.vocab for letter in row["text"]]
        return torch.tensor(ids[:64])


class Model(nn.Module):
    def __init__(self, vocab, hidden, layers):
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        layer = nn.TransformerEncoderLayer(hidden, 4, 4 * hidden, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(hidden, vocab)

    def forward(self, ids):
        return self.head(self.blocks(self.embed(ids)))


def save(model, optimizer, step, folder):
    path = Path(folder) / f"step-{step}.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, path)
    log.info("saved %s", path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="data")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--save-dir", default="checkpoints")
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--resume")
    parser.add_argument("--backend", default="gloo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--timeout", type=int, default=600)
    args = parser.parse_args()

    dist.init_process_group(args.backend, timeout=timedelta(seconds=args.timeout))
    rank, world = dist.get_rank(), dist.get_world_size()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    log.info("world size %d, arguments %s", world, vars(args))
    torch.manual_seed(0)
    model = Model(args.vocab, args.hidden, args.layers).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    first = 0
    if args.resume:
        state = torch.load(args.resume, map_location="cpu")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        log.info("resumed from %s at step %d", args.resume, first)
    model = DistributedDataParallel(model)
    loader = DataLoader(Shard(args.data, rank, args.vocab), batch_size=args.batch_size, num_workers=args.workers)
    step, began = first, time.time()
    while step < args.steps:
        for ids in loader:
            ids = ids.to(args.device)
            logits = model(ids[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 5 == 0:
                log.info("step %d loss %.4f %.1f steps/s", step, loss.item(), (step - first) / (time.time() - began))
            if step % args.save_every == 0 and rank == 0:
                Path(args.save_dir).mkdir(parents=True, exist_ok=True)
                save(model.module, optimizer, step, args.save_dir)
            if step >= args.steps:
                break
    dist.barrier()
    log.info("finished after %d steps", step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
