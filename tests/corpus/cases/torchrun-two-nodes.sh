#!/bin/bash
# expect: python_exception rank=3 host=node2
# how: sbatch -w node1,node2 -N2 --ntasks-per-node=1
set -e
python shards.py 4 100
echo '"a line of text without a field"' >> data/shard-3.jsonl
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
srun bash -c "torchrun --nnodes 2 --node-rank \$SLURM_NODEID --nproc_per_node 2 --master-addr $MASTER --master-port 29504 pretrain.py --steps 60"
