# expect: unknown rank=0
# how: login
export RAYLAUNCH_STATE_DIR=$PWD/state PYTHONPATH=$CHECKOUT
ray() { python -c "from raylaunch.cli import main; main()" "$@"; }
cat > train.py <<'PY'
import sys
import time

import torch.distributed as dist

dist.init_process_group("gloo")
if dist.get_rank() == 0:
    sys.exit(3)
time.sleep(60)
PY
echo "{trainer: {script: $PWD/train.py}, elastic: {restart_backoff: 0}}" > run.yaml
ray up --backend local --nodes 2 >/dev/null 2>&1
ray train run.yaml --run second
ray logs second
ray down --all >/dev/null 2>&1
