# A job of a partition of higher priority takes the nodes.
# expect: preempted
# how: login
printf '#!/bin/bash\npython shards.py 1 100\nsrun torchrun --standalone --nproc_per_node 1 pretrain.py --steps 1000000 --save-every 100000\n' > train.sbatch
scontrol update partition=lowc GraceTime=0
job=$(sbatch --parsable -N1 -w node2 --exclusive -p lowc -o slurm-%j.out train.sbatch)
while ! grep -q 'step 20 ' slurm-$job.out 2>/dev/null; do sleep 1; done
srun -p main -w node2 --exclusive sleep 1 >/dev/null 2>&1
while squeue -h -j $job | grep -q .; do sleep 1; done
cat slurm-$job.out
