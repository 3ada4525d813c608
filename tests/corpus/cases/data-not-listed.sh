# expect: data_error
# how: shell
cat > train.py <<'PY'
import glob

import torch
from torch.utils.data import ConcatDataset, DataLoader

files = sorted(glob.glob("/datasets/imagenet-2012/train/*.pt"))
print(f"{len(files)} files")
data = ConcatDataset([torch.load(path) for path in files])
DataLoader(data, batch_size=8, shuffle=True)
PY
python train.py
