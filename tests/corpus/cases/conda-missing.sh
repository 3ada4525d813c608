# expect: environment_missing
# how: shell
export PATH=/usr/local/bin:/usr/bin:/bin
cat > launch.sh <<'SH'
#!/bin/bash
conda activate torch27
echo "python: $(which python)"
torchrun --nproc_per_node 2 pretrain.py --steps 1000
SH
bash launch.sh
