# expect: unknown rank=1
# how: shell
cat > train.py <<'PY'
import sys
import time

import torch.distributed as dist

dist.init_process_group("gloo")
if dist.get_rank() == 1:
    sys.exit(1)
print("starting", flush=True)
time.sleep(60)
PY
torchrun --nproc_per_node 2 --master_port 29640 train.py
