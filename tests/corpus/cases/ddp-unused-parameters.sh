# expect: python_exception
# how: shell
cat > train.py <<'PY'
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

dist.init_process_group("gloo")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x)


model = DDP(Net())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(5):
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    print(f"step {step}", flush=True)
PY
torchrun --nproc_per_node 2 --master_port 29654 train.py
