# expect: data_error
# how: shell
cat > make_weights.py <<'PY'
import torch
from safetensors.torch import save_file

save_file({"w": torch.ones(512, 512), "b": torch.ones(512)}, "model.safetensors")
PY
python make_weights.py >/dev/null 2>&1
truncate -s 500000 model.safetensors
cat > train.py <<'PY'
import torch.distributed as dist
from safetensors.torch import load_file

dist.init_process_group("gloo")
weights = load_file("model.safetensors")
print(sorted(weights))
PY
torchrun --nproc_per_node 2 --master_port 29646 train.py
