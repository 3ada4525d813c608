# expect: slurm_submit
# how: login
printf '#!/bin/bash\n#SBATCH --gres=gpu:h100:8\n#SBATCH --nodes=2\nsrun python train.py\n' > train.sbatch
sbatch train.sbatch
