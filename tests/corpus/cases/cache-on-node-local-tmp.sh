#!/bin/bash
# Rank 0 prepares the data in /tmp, which is each node's own.
# expect: not_shared rank=1 host=node2
# how: sbatch -w node1,node2 -N2 --ntasks-per-node=1
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1) MASTER_PORT=29501
cat > train.py <<'PY'
import os
import socket

import torch
import torch.distributed as dist

os.environ.update(RANK=os.environ["SLURM_PROCID"], WORLD_SIZE=os.environ["SLURM_NTASKS"])
dist.init_process_group("gloo")
cache = "/tmp/ada/cache/tokens.pt"
if dist.get_rank() == 0:
    os.makedirs(os.path.dirname(cache), exist_ok=True)
    torch.save(torch.arange(1000), cache)
    print(f"[rank 0] wrote {cache} on {socket.gethostname()}", flush=True)
dist.barrier()
tokens = torch.load(cache)
print(f"[rank {dist.get_rank()}] {len(tokens)} tokens", flush=True)
dist.barrier()
PY
srun -l python train.py
