#!/bin/bash
# expect: environment_missing
# how: sbatch -N2 --ntasks-per-node=1
set -euo pipefail
IMAGE=/images/pytorch-25.09.sif
srun apptainer exec --nv $IMAGE torchrun --nnodes 2 --nproc_per_node 8 pretrain.py
