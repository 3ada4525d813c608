# expect: mismatch
# how: shell
python shards.py 1 100
torchrun --nproc_per_node 1 --master_port 29616 pretrain.py --steps 10 >/dev/null 2>&1
torchrun --nproc_per_node 1 --master_port 29616 pretrain.py --steps 40 --layers 3 --resume checkpoints/step-10.pt
