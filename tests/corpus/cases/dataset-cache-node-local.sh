#!/bin/bash
# The script unpacks on the first node alone.
# expect: not_shared host=node2
# how: sbatch -w node1,node2 -N2 --ntasks-per-node=1
set -e
python shards.py 2 100
mkdir -p /tmp/ada-$SLURM_JOB_ID && cp -r data /tmp/ada-$SLURM_JOB_ID/
echo "data staged to /tmp/ada-$SLURM_JOB_ID on $(hostname)"
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
srun torchrun --nnodes 2 --nproc_per_node 1 --rdzv-backend c10d --rdzv-id 8 --rdzv-endpoint $MASTER:29502 \
  pretrain.py --data /tmp/ada-$SLURM_JOB_ID/data --steps 100
