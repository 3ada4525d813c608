#!/bin/bash
# expect: unknown host=node2 rank=1
# how: sbatch -w node1,node2 -N2 --ntasks-per-node=1
srun bash -c 'echo "task $SLURM_PROCID on $(hostname)"; if [ $SLURM_PROCID = 1 ]; then exec python -c "import ctypes; ctypes.string_at(0)"; fi; sleep 3'
