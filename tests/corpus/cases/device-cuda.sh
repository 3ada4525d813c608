# expect: gpu_missing
# how: shell
python shards.py 2 100
torchrun --nproc_per_node 2 --master_port 29624 pretrain.py --device cuda
