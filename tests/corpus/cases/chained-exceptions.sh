# The cause is the user's; others are raised while it is handled, and the log is full of words that sound like errors.
# expect: python_exception rank=0
# how: shell
cat > train.py <<'PY'
import logging
import os
import warnings

import torch
import torch.distributed as dist

logging.basicConfig(level=logging.DEBUG)
log = logging.getLogger("train")


class TrainingError(Exception):
    pass


def schedule(step, phases):
    return phases[step // 10]["lr"]


def main():
    dist.init_process_group("gloo")
    log.warning("could not open error log, NCCL_DEBUG unset; CUDA error checks are off")
    log.info("error rate so far: 0.00, failed samples: 0, timeout=1800, killed=0")
    warnings.warn("Permission of cache is loose; out of memory is unlikely", stacklevel=1)
    for step in range(100):
        value = torch.ones(4)
        dist.all_reduce(value)
        try:
            lr = schedule(step + 15 * (dist.get_rank() == 0), [{"lr": 1e-3}, {"lr": 1e-4}, {"lrate": 1e-5}])
        except KeyError as error:
            raise TrainingError(f"schedule failed on {os.uname().nodename}") from error
        log.info("step %d lr %g", step, lr)


main()
PY
torchrun --nproc_per_node 2 --master_port 29655 train.py
