# expect: python_exception
# how: shell
torchrun --nproc_per_node 2 --master_port 29614 pretrain.py --steps 40 --learning-rate 1e-4
