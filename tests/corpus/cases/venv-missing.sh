# expect: environment_missing
# how: shell
export PATH=/usr/local/bin:/usr/bin:/bin
cat > launch.sh <<'SH'
#!/bin/bash
set -e
source /home/ada/envs/torch27/bin/activate
torchrun --nproc_per_node 2 pretrain.py
SH
bash launch.sh
