# expect: import_error
# how: shell
cat > train.py <<'PY'
import torch.distributed as dist
from flash_attn import flash_attn_func

dist.init_process_group("gloo")
print(flash_attn_func)
PY
torchrun --nproc_per_node 2 --master_port 29633 train.py
