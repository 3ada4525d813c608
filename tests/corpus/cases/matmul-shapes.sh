# expect: mismatch
# how: shell
cat > train.py <<'PY'
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

dist.init_process_group("gloo")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.fc = torch.nn.Linear(8 * 30 * 30, 10)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))


model = DDP(Net())
print(model(torch.randn(4, 3, 28, 28)).shape)
PY
torchrun --nproc_per_node 2 --master_port 29647 train.py
