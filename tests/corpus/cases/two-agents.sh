# Two nodes' launchers (here side by side); a rank of the second fails, both logs in one file as srun makes it.
# expect: python_exception rank=3
# how: shell
python shards.py 4 100
echo '[1, 2, 3]' >> data/shard-3.jsonl
for node in 0 1; do
  torchrun --nnodes 2 --node-rank $node --nproc_per_node 2 --master-addr 127.0.0.1 --master-port 29656 pretrain.py --steps 60 &
done
wait
