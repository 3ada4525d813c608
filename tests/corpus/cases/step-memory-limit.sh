#!/bin/bash
# Slurm's own accounting of memory ends the step (JobAcctGatherParams=OverMemoryKill, which make.py sets).
# expect: oom_host
# how: sbatch -w node2 -N1 -n1 --mem=400M
cat > preprocess.py <<'PY'
import time

import numpy as np

held = []
for shard in range(100):
    held.append(np.ones(10_000_000))
    print(f"shard {shard} loaded", flush=True)
    time.sleep(1)
PY
srun python preprocess.py
