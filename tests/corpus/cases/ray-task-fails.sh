# expect: python_exception
# how: login
cat > sweep.py <<'PY'
import ray

ray.init(num_cpus=2, include_dashboard=False)


@ray.remote
def trial(settings):
    return settings["lr"] / settings["warmup_steps"]


print(ray.get([trial.remote({"lr": 1e-3, "warmup_steps": steps}) for steps in (100, 10, 0)]))
PY
python sweep.py
