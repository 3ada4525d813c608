# The second process is never started.
# expect: network_setup
# how: shell
python shards.py 2 100
export MASTER_ADDR=127.0.0.1 MASTER_PORT=29629 RANK=0 WORLD_SIZE=2
python pretrain.py --timeout 8
