# expect: data_error
# how: shell
python shards.py 2 100
torchrun --nproc_per_node 2 --master_port 29617 pretrain.py --steps 10 >/dev/null 2>&1
truncate -s 200000 checkpoints/step-10.pt
torchrun --nproc_per_node 2 --master_port 29617 pretrain.py --steps 40 --resume checkpoints/step-10.pt
