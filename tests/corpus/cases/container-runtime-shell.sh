#!/bin/bash
# expect: environment_missing
# how: sbatch -N1
IMAGE=/images/pytorch-25.09.sif
singularity exec --nv $IMAGE python pretrain.py
echo "exit code $?"
