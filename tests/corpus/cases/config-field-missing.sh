# expect: python_exception
# how: shell
cat > config.yaml <<'Y'
model: {hidden: 64, layers: 2}
optimizer: {lr: 3.0e-4}
Y
cat > train.py <<'PY'
import logging
from types import SimpleNamespace

import torch.distributed as dist
import yaml
from torch.distributed.elastic.multiprocessing.errors import record

logging.basicConfig(level=logging.INFO)


def read(path):
    return SimpleNamespace(**{k: SimpleNamespace(**v) for k, v in yaml.safe_load(open(path)).items()})


@record
def main():
    config = read("config.yaml")
    dist.init_process_group("gloo")
    logging.info("hidden=%d", config.model.hidden)
    logging.info("warm-up steps: %d", config.scheduler.warmup)


if __name__ == "__main__":
    main()
PY
torchrun --nproc_per_node 2 --master_port 29636 train.py
