# Rank 1 is busy for longer than the time-out of the collective.
# expect: nccl_timeout
# how: shell
cat > train.py <<'PY'
import time
from datetime import timedelta

import torch
import torch.distributed as dist

dist.init_process_group("gloo", timeout=timedelta(seconds=6))
for step in range(20):
    value = torch.ones(8)
    dist.all_reduce(value)
    if step == 10 and dist.get_rank() == 1:
        time.sleep(20)
    print(f"[{dist.get_rank()}] step {step}", flush=True)
PY
torchrun --nproc_per_node 2 --master_port 29641 train.py
