#!/bin/bash
# expect: data_error
# how: sbatch -N1
set -e
mkdir -p stage
cp data/corpus-v3.tar stage/
tar xf stage/corpus-v3.tar -C stage
srun python pretrain.py --data stage
