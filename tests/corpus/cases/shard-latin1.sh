# expect: data_error rank=0
# how: shell
python shards.py 2 100
printf '{"text": "caf\xe9 au lait"}\n' >> data/shard-0.jsonl
torchrun --nproc_per_node 2 --redirects 1 --log-dir logs --tee 2 --master_port 29623 pretrain.py --steps 40
