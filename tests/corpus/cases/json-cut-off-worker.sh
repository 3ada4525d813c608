# A line of JSON was cut off while it was written; read by a worker of the DataLoader of rank 0.
# expect: data_error rank=0
# how: shell
python shards.py 2 100
sed -i '61s/^\(.\{40\}\).*/\1/' data/shard-0.jsonl
torchrun --nproc_per_node 2 --tee 3 --master_port 29613 pretrain.py --steps 40 --workers 1
