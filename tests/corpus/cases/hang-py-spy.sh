# Rank 1 waits for a file that nobody writes; rank 0 in the all-reduce. The user looked with py-spy.
# expect: hang rank=1
# how: shell
cat > train.py <<'PY'
import os
import time

import torch
import torch.distributed as dist


def wait_for_index(path):
    while not os.path.exists(path):
        time.sleep(0.5)


dist.init_process_group("gloo")
print(f"rank {dist.get_rank()} of {dist.get_world_size()} pid {os.getpid()}", flush=True)
for step in range(100):
    value = torch.ones(8)
    dist.all_reduce(value)
    if step == 30 and dist.get_rank() == 1:
        wait_for_index("data/index.bin")
    if step % 10 == 0 and dist.get_rank() == 0:
        print(f"step {step} loss {3 / (step + 1):.3f}", flush=True)
PY
torchrun --nproc_per_node 2 --master_port 29651 train.py > run.txt 2>&1 &
while ! grep -q 'step 30' run.txt 2>/dev/null; do sleep 1; done
sleep 8
cat run.txt
for pid in $(grep -o 'pid [0-9]*' run.txt | cut -d' ' -f2); do
  echo; echo "\$ py-spy dump --pid $pid"; py-spy dump --pid $pid
done
kill %1; wait >/dev/null 2>&1
