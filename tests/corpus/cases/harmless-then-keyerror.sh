#!/bin/bash
# Set-up that fails without doing harm (no `module` here, no old directory), then a mistake in the program.
# expect: python_exception
# how: sbatch -N1
module load cuda/12.4
rm logs/old-*.txt
cd /scratch/ada-2025/project
python shards.py 1 100
cat > train.py <<'PY'
import os

import torch

torch.manual_seed(int(os.environ["EXPERIMENT_SEED"]))
PY
srun python train.py
echo "done"
