# An actor whose process ends with a code of its own: no kind of its own.
# expect: unknown
# how: login
cat > serve.py <<'PY'
import os

import ray

ray.init(num_cpus=2, include_dashboard=False)


@ray.remote
class Worker:
    def step(self, number):
        if number == 3:
            os._exit(7)
        return number


worker = Worker.remote()
for number in range(5):
    print("step", ray.get(worker.step.remote(number)))
PY
python serve.py
