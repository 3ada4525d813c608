# A record without a label; accelerate adds a traceback of its own.
# expect: python_exception
# how: shell
cat > train.py <<'PY'
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.AdamW(model.parameters())
rows = [{"x": torch.ones(8), "y": 1.0 if number != 37 else None} for number in range(64)]
data = torch.utils.data.DataLoader(rows, batch_size=4)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
for step, batch in enumerate(data):
    loss = (model(batch["x"]).squeeze() - batch["y"]).pow(2).mean()
    accelerator.backward(loss.float())
    optimizer.step()
    accelerator.print(f"step {step} loss {loss.item():.4f}", flush=True)
PY
accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no train.py
