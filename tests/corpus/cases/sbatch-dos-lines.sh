# expect: slurm_submit
# how: login
printf '#!/bin/bash\r\n#SBATCH --nodes=2\r\nsrun python train.py\r\n' > train.sbatch
sbatch train.sbatch
