# expect: oom_host rank=0
# how: shell
cat > train.py <<'PY'
import numpy as np
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
if rank == 0:
    table = np.zeros((400_000, 12_288), dtype=np.float64)
    table += 1
total = torch.ones(1)
dist.all_reduce(total)
PY
ulimit -v 16000000
torchrun --nproc_per_node 2 --tee 3 --master_port 29638 train.py
