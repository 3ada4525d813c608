# expect: python_exception
# how: shell
cat > train.py <<'PY'
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64).to(torch.bfloat16))
fully_shard(model, mesh=mesh)
print(model(torch.randn(2, 64)).sum())
PY
torchrun --nproc_per_node 2 --master_port 29653 train.py
