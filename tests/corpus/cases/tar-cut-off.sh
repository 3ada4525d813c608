# expect: data_error
# how: shell
python shards.py 4 800
tar cf train-000017.tar data; truncate -s 150000 train-000017.tar
cat > train.py <<'PY'
import tarfile

from torch.utils.data import DataLoader, IterableDataset


class Samples(IterableDataset):
    def __iter__(self):
        with tarfile.open("train-000017.tar") as tar:
            for member in tar:
                if member.isfile():
                    yield from tar.extractfile(member).read().decode().splitlines()


for step, batch in enumerate(DataLoader(Samples(), batch_size=64, num_workers=1)):
    if step % 10 == 0:
        print(f"step {step}", flush=True)
PY
python train.py
