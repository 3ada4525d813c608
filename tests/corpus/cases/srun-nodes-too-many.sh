# expect: slurm_submit
# how: login
echo "$ srun -N 40 --ntasks-per-node 4 python train.py"
srun -N 40 --ntasks-per-node 4 python train.py
