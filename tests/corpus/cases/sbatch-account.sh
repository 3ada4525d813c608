# expect: slurm_submit
# how: login
scontrol update partition=main AllowAccounts=physics
printf '#!/bin/bash\n#SBATCH --account=chem-ml\n#SBATCH --nodes=2\nsrun python train.py\n' > train.sbatch
sbatch train.sbatch
scontrol update partition=main AllowAccounts=ALL
