#!/bin/bash
# expect: environment_missing
# how: sbatch -N2 --ntasks-per-node=1
set -e
echo "Starting job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"
export PATH=/usr/local/bin:/usr/bin:/bin
srun torchrun --nnodes 2 --nproc_per_node 4 pretrain.py
