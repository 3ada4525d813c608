# expect: permission rank=0
# how: shell
python shards.py 2 100
unshare -m bash -c '
mkdir checkpoints; mount -t tmpfs -o ro tmpfs checkpoints
torchrun --nproc_per_node 2 --master_port 29619 pretrain.py --steps 40'
