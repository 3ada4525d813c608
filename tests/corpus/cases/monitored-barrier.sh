# expect: nccl_timeout rank=1
# how: shell
cat > train.py <<'PY'
import time
from datetime import timedelta

import torch
import torch.distributed as dist


def evaluate():
    if dist.get_rank() == 1:
        time.sleep(20)
    return 0.5


dist.init_process_group("gloo")
print("evaluation accuracy", evaluate(), flush=True)
dist.monitored_barrier(timeout=timedelta(seconds=5))
PY
torchrun --nproc_per_node 2 --master_port 29642 train.py
