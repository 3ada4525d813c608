# expect: network_setup
# how: shell
python shards.py 4 100
torchrun --nnodes 2 --nproc_per_node 2 --rdzv-backend c10d --rdzv-id 77 --rdzv-conf join_timeout=10 \
  --rdzv-endpoint localhost:29630 pretrain.py
