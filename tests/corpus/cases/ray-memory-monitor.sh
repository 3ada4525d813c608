# Ray's own monitor ends a worker before the kernel does.
# expect: oom_host
# how: login
cat > preprocess.py <<'PY'
import os
import time

import numpy as np
import psutil
import ray

memory = psutil.virtual_memory()
os.environ["RAY_memory_usage_threshold"] = str(round(memory.percent / 100 + 0.03, 3))
os.environ["RAY_memory_monitor_refresh_ms"] = "100"
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)


@ray.remote(max_retries=0)
def tokenize(shard):
    held = []
    for _ in range(40):
        held.append(np.ones(15_000_000))
        time.sleep(0.2)
    return len(held)


print(ray.get(tokenize.remote(3)))
PY
python preprocess.py
