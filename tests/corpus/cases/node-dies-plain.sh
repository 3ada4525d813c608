# expect: node_failure host=node3
# how: login
printf '#!/bin/bash\nsrun -l bash -c "while :; do date; sleep 5; done"\n' > train.sbatch
job=$(sbatch --parsable --no-requeue -w node1,node3 -N2 --ntasks-per-node=1 -o slurm-%j.out train.sbatch)
while ! grep -q '1: ' slurm-$job.out 2>/dev/null; do sleep 1; done
python $CHECKOUT/tests/corpus/programs/sandbox.py kill node3
while squeue -h -j $job | grep -q .; do sleep 1; done
sleep 2
cat slurm-$job.out
python $CHECKOUT/tests/corpus/programs/sandbox.py start node3
