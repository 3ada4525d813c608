# expect: data_error rank=1
# how: shell
python shards.py 1 100
torchrun --nproc_per_node 2 --master_port 29621 pretrain.py --steps 40
