# expect: mismatch
# how: shell
cat > train.py <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

dist.init_process_group("gloo")
hidden = int(sys.argv[2])
model = torch.nn.Sequential(torch.nn.Linear(64, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 64))
state = {"model": model.state_dict()}
(dcp.save if sys.argv[1] == "save" else dcp.load)(state, checkpoint_id="checkpoints/step-100")
PY
torchrun --nproc_per_node 2 --master_port 29644 train.py save 128 >/dev/null 2>&1
torchrun --nproc_per_node 2 --master_port 29644 train.py load 192
