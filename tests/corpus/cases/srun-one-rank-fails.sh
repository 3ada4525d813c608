#!/bin/bash
# Plain python under srun, labelled lines.
# expect: python_exception rank=1 host=node2
# how: sbatch -w node1,node2 -N2 --ntasks-per-node=1
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1) MASTER_PORT=29503
python shards.py 2 100
echo 'null' >> data/shard-1.jsonl
srun -l --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS python pretrain.py --steps 60'
