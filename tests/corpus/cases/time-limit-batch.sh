#!/bin/bash
# expect: time_limit
# how: sbatch -N2 --ntasks-per-node=1 --time=1
set -e
echo "Starting job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"
python shards.py 2 100
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
srun torchrun --nnodes 2 --nproc_per_node 1 --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID --rdzv-endpoint $MASTER_ADDR:29500 \
  pretrain.py --steps 10000000 --save-every 100000
