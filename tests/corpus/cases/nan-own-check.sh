# A learning rate far too large; the program looks at its loss.
# expect: nan
# how: shell
cat > train.py <<'PY'
import logging
import math

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

dist.init_process_group("gloo")
logging.basicConfig(level=logging.INFO, format=f"%(asctime)s [rank {dist.get_rank()}] %(levelname)s %(message)s")
torch.manual_seed(0)
model = DDP(torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)))
optimizer = torch.optim.SGD(model.parameters(), lr=30.0)
for step in range(200):
    x = torch.randn(32, 16)
    loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
    if step % 2 == 0:
        logging.info("step %d loss %g", step, loss.item())
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"loss is {loss.item()} at step {step}; stopping")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
PY
torchrun --nproc_per_node 2 --master_port 29649 train.py
