#!/bin/bash
# The name of a node of another job.
# expect: network_setup
# how: sbatch -w node1,node2 -N2 --ntasks-per-node=1
export MASTER_ADDR=node17 MASTER_PORT=29506 WORLD_SIZE=2
python shards.py 2 100
srun -l bash -c 'RANK=$SLURM_PROCID python pretrain.py --timeout 6'
