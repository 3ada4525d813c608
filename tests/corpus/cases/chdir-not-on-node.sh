# Submitted from a directory that the compute nodes do not have.
# expect: not_shared
# how: login
out=$PWD
mkdir -p /tmp/ada-project; cp shards.py pretrain.py /tmp/ada-project; cd /tmp/ada-project
printf '#!/bin/bash\npython shards.py 1 10\nsrun torchrun --standalone --nproc_per_node 1 pretrain.py\n' > train.sbatch
sbatch -W -o $out/slurm.txt -N1 train.sbatch >/dev/null 2>&1
cat $out/slurm.txt
rm -r /tmp/ada-project
