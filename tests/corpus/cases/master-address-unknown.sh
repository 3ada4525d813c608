# expect: network_setup
# how: shell
python shards.py 1 100
export MASTER_ADDR=gpu-node-17.cluster MASTER_PORT=29627 RANK=1 WORLD_SIZE=2
python pretrain.py --timeout 8
