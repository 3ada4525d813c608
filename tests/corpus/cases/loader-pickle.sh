# expect: python_exception
# how: shell
cat > train.py <<'PY'
import torch
from torch.utils.data import DataLoader


def main():
    scale = 0.5
    data = [torch.ones(4) for _ in range(16)]
    loader = DataLoader(
        data, batch_size=4, num_workers=2, multiprocessing_context="spawn", collate_fn=lambda rows: torch.stack(rows) * scale
    )
    for batch in loader:
        print(batch.shape)


if __name__ == "__main__":
    main()
PY
python train.py
