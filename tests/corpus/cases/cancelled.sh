# Somebody's scancel: no kind of its own.
# expect: unknown
# how: login
printf '#!/bin/bash\npython shards.py 1 100\nsrun torchrun --standalone --nproc_per_node 1 pretrain.py --steps 1000000 --save-every 100000\n' > train.sbatch
job=$(sbatch --parsable -N1 -o slurm-%j.out train.sbatch)
while ! grep -q 'step 20 ' slurm-$job.out 2>/dev/null; do sleep 1; done
scancel $job
while squeue -h -j $job | grep -q .; do sleep 1; done
cat slurm-$job.out
