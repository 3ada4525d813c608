# Native code that is wrong: no kind of its own.
# expect: unknown rank=1
# how: shell
cat > train.py <<'PY'
import ctypes

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
for step in range(20):
    value = torch.ones(8)
    dist.all_reduce(value)
    if step == 12 and dist.get_rank() == 1:
        ctypes.string_at(0)
PY
torchrun --nproc_per_node 2 --master_port 29639 train.py
