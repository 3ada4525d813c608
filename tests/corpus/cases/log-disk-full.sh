# expect: disk_full
# how: shell
cat > train.py <<'PY'
import json

import torch

with open("out/metrics.jsonl", "w", buffering=1) as out:
    for step in range(200_000):
        loss = torch.rand(1).item()
        out.write(json.dumps({"step": step, "loss": loss, "lr": 3e-4}) + "\n")
        if step % 5000 == 0:
            print(f"step {step} loss {loss:.3f}", flush=True)
PY
unshare -m bash -c 'mkdir out; mount -t tmpfs -o size=1m tmpfs out; python train.py'
