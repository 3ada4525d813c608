#!/bin/bash
# A limit of address space, which one task alone has.
# expect: oom_host
# how: sbatch -w node1,node2 -N2 --ntasks-per-node=1
cat > train.sh <<'SH'
if [ $SLURM_PROCID = 1 ]; then ulimit -v 3500000; fi
exec python -c "
import torch
print('task', flush=True)
cache = [torch.randn(20_000_000) for _ in range(40 if '$SLURM_PROCID' == '1' else 1)]
print(len(cache))"
SH
srun -l bash train.sh
