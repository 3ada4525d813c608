# The checkpoint does not fit; torch's writer does not pass on what the system said.
# expect: disk_full rank=0
# how: shell
python shards.py 2 100
unshare -m bash -c '
mkdir checkpoints; mount -t tmpfs -o size=1m tmpfs checkpoints
torchrun --nproc_per_node 2 --master_port 29618 pretrain.py --steps 40'
