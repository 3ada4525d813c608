# expect: mismatch
# how: shell
cat > train.py <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

dist.init_process_group("gloo")
layers = [torch.nn.Linear(64, 64) for _ in range(int(sys.argv[2]))]
state = {"model": torch.nn.Sequential(*layers).state_dict()}
(dcp.save if sys.argv[1] == "save" else dcp.load)(state, checkpoint_id="checkpoints/step-100")
PY
torchrun --nproc_per_node 2 --master_port 29645 train.py save 2 >/dev/null 2>&1
torchrun --nproc_per_node 2 --master_port 29645 train.py load 3
