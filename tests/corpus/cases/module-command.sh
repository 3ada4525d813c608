#!/bin/bash
# expect: environment_missing
# how: sbatch -N1
export PATH=/usr/local/bin:/usr/bin:/bin
module purge
module load cuda/12.4 python/3.11
source venv/bin/activate
python pretrain.py --steps 1000
