# expect: data_error rank=1
# how: shell
python shards.py 2 100
: > data/shard-1.jsonl
cat > train.py <<'PY'
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from pretrain import Shard

dist.init_process_group("gloo")
data = DataLoader(Shard("data", dist.get_rank(), 128), batch_size=4, shuffle=True)
print(f"rank {dist.get_rank()}: {len(data)} batches", flush=True)
dist.barrier()
PY
torchrun --nproc_per_node 2 --master_port 29622 train.py
