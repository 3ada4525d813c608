# expect: data_error
# how: shell
cat > train.py <<'PY'
import pyarrow.parquet as pq
import torch.distributed as dist

dist.init_process_group("gloo")
table = pq.read_table(f"part-{dist.get_rank():05d}.parquet")
print(table.num_rows)
dist.barrier()
PY
python -c "
import pyarrow as pa, pyarrow.parquet as pq
for n in range(2): pq.write_table(pa.table({'ids': list(range(5000))}), f'part-{n:05d}.parquet')"
truncate -s 9000 part-00001.parquet
torchrun --nproc_per_node 2 --master_port 29650 train.py
