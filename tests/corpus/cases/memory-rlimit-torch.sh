# expect: oom_host
# how: shell
cat > train.py <<'PY'
import torch

model = torch.nn.Sequential(*[torch.nn.Linear(32768, 32768, bias=False) for _ in range(8)])
print(sum(p.numel() for p in model.parameters()))
PY
ulimit -v 9000000
python -u train.py > train.log 2>&1
cat train.log
