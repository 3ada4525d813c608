# expect: slurm_submit
# how: login
printf '#!/bin/bash\n#SBATCH --cpus-per-task=96\n#SBATCH --nodes=2\nsrun python train.py\n' > train.sbatch
sbatch train.sbatch
