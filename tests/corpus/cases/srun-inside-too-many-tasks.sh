#!/bin/bash
# The step asks for more than the job has.
# expect: slurm_submit
# how: sbatch -N2 -n2
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"
srun -N4 -n16 python pretrain.py
