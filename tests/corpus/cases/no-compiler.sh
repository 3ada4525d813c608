# torch.compile where no compiler is installed.
# expect: environment_missing
# how: shell
cat > train.py <<'PY'
import torch

model = torch.compile(torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU()))
print(model(torch.randn(2, 16)).sum())
PY
python=$(command -v python)
mkdir bin
PATH=$PWD/bin TORCHINDUCTOR_CACHE_DIR=$PWD/cache $python train.py
