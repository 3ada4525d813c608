# One shard lacks a field that the program reads: rank 1 alone fails, rank 0 waits in the all-reduce of its gradients.
# expect: python_exception rank=1
# how: shell
python shards.py 2 100
python - <<'PY'
import json
rows = open("data/shard-1.jsonl").read().splitlines()
row = json.loads(rows[50]); row["content"] = row.pop("text"); rows[50] = json.dumps(row)
open("data/shard-1.jsonl", "w").write("\n".join(rows) + "\n")
PY
echo "Starting on $(hostname) at $(date)"
torchrun --nproc_per_node 2 --master_port 29612 pretrain.py --steps 40
echo "Job finished at $(date)"
