# expect: network_setup
# how: shell
python shards.py 2 100
export GLOO_SOCKET_IFNAME=ib0
torchrun --nproc_per_node 2 --master_port 29626 pretrain.py
