# expect: slurm_submit
# how: login
printf '#!/bin/bash\n#SBATCH --partition=small\n#SBATCH --time=2-00:00:00\nsrun python train.py\n' > train.sbatch
sbatch train.sbatch
