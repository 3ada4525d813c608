# Two jobs on one node, with the same port in their scripts.
# expect: port_in_use
# how: login
python shards.py 1 100
printf '#!/bin/bash\nexport MASTER_ADDR=$(hostname) MASTER_PORT=29505 RANK=0 WORLD_SIZE=1\nsrun -n1 python pretrain.py --steps ${1:-40}\n' > train.sbatch
first=$(sbatch --parsable -w node3 -n1 -c1 --mem=1G -o first.txt train.sbatch 1000000)
while ! grep -q 'step 10 ' first.txt 2>/dev/null; do sleep 1; done
sbatch -W -w node3 -n1 -c1 --mem=1G -o second.txt train.sbatch >/dev/null
scancel $first
cat second.txt
