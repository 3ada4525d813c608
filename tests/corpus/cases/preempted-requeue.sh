# expect: preempted
# how: login
printf '#!/bin/bash\necho "job $SLURM_JOB_ID restart ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST"\nsrun python train.py\n' > train.sbatch
cat > train.py <<'PY'
import time

for step in range(10_000):
    print(f"epoch 0 step {step} loss {8 / (step + 1) ** 0.3:.3f}", flush=True)
    time.sleep(1)
PY
scontrol update partition=low GraceTime=0
job=$(sbatch --parsable --open-mode=append -N1 -w node2 --exclusive -p low -o slurm-%j.out train.sbatch)
while ! grep -q 'step 8 ' slurm-$job.out 2>/dev/null; do sleep 1; done
srun -p main -w node2 --exclusive sleep 1 >/dev/null 2>&1
cat slurm-$job.out
scancel $job
