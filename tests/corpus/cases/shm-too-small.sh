# Workers hand their batches over in /dev/shm, of which a container has little.
# expect: oom_host
# how: shell
cat > train.py <<'PY'
import torch
from torch.utils.data import DataLoader, Dataset


class Images(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.randn(3, 512, 512)


for step, batch in enumerate(DataLoader(Images(), batch_size=8, num_workers=2)):
    print(f"step {step} mean {batch.mean():.4f}", flush=True)
PY
unshare -m bash -c 'mount -t tmpfs -o size=16m tmpfs /dev/shm; python train.py'
