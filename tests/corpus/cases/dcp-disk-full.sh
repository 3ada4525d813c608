# expect: disk_full
# how: shell
cat > train.py <<'PY'
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512))
fully_shard(model, mesh=mesh)
dcp.save({"model": model.state_dict()}, checkpoint_id="checkpoints/step-100")
dist.destroy_process_group()
PY
unshare -m bash -c '
mkdir checkpoints; mount -t tmpfs -o size=1m tmpfs checkpoints
torchrun --nproc_per_node 2 --master_port 29643 train.py'
