#!/bin/bash
# expect: time_limit
# how: sbatch -N1 --time=1
cat > train.py <<'PY'
import time

for step in range(10_000):
    print(f"epoch 0 step {step} loss {8 / (step + 1) ** 0.3:.3f}", flush=True)
    time.sleep(2)
PY
srun python train.py
