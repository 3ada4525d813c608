# expect: node_failure host=node2
# how: login
printf '#!/bin/bash\nexport MASTER_ADDR=node1\nsrun torchrun --nnodes 2 --nproc_per_node 1 --rdzv-backend c10d --rdzv-id 7 --rdzv-endpoint node1:29500 pretrain.py --steps 1000000 --save-every 100000\n' > train.sbatch
python shards.py 2 100
job=$(sbatch --parsable --no-requeue -w node1,node2 -N2 --ntasks-per-node=1 -o slurm-%j.out train.sbatch)
while ! grep -q 'step 20 ' slurm-$job.out 2>/dev/null; do sleep 1; done
python $CHECKOUT/tests/corpus/programs/sandbox.py kill node2
while squeue -h -j $job | grep -q .; do sleep 1; done
sleep 2
cat slurm-$job.out
python $CHECKOUT/tests/corpus/programs/sandbox.py start node2
