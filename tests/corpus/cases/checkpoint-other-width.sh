# expect: mismatch
# how: shell
python shards.py 2 100
torchrun --nproc_per_node 2 --master_port 29615 pretrain.py --steps 10 >/dev/null 2>&1
torchrun --nproc_per_node 2 --master_port 29615 pretrain.py --steps 40 --hidden 96 --resume checkpoints/step-10.pt
