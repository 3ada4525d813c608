# The kernel ends rank 1, whose cgroup may use 700 MB.
# expect: oom_host rank=1
# how: shell
cat > train.py <<'PY'
import os

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
if os.environ.get("CG") and rank == 1:
    open(os.environ["CG"] + "/cgroup.procs", "w").write(str(os.getpid()))
cache = []
for step in range(200):
    value = torch.ones(1000)
    dist.all_reduce(value)
    if rank == 1:
        cache.append(torch.randn(5_000_000))
    if step % 10 == 0 and rank == 0:
        print(f"step {step} ok", flush=True)
PY
CG=/sys/fs/cgroup/memory/why-corpus-$$
mkdir $CG; echo 700M > $CG/memory.limit_in_bytes
export CG
torchrun --nproc_per_node 2 --master_port 29637 train.py
rmdir $CG
