# expect: nan
# how: shell
cat > train.py <<'PY'
import torch

torch.autograd.set_detect_anomaly(True)
weight = torch.zeros(8, requires_grad=True)
optimizer = torch.optim.SGD([weight], lr=0.1)
for step in range(10):
    loss = torch.sqrt(weight).mul(torch.zeros(8)).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(step, loss.item())
PY
python train.py
