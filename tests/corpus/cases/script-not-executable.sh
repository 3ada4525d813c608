#!/bin/bash
# expect: permission
# how: sbatch -N2 --ntasks-per-node=1
printf '#!/bin/bash\npython pretrain.py\n' > run.sh
srun ./run.sh
