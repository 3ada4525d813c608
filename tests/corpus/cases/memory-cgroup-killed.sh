# As above without torchrun: the shell alone says it.
# expect: oom_host
# how: shell
cat > preprocess.py <<'PY'
import numpy as np
import torch

print(f"torch {torch.__version__}, loading shards", flush=True)
held = []
for shard in range(64):
    held.append(np.random.rand(8_000_000))
    print(f"shard {shard}: {sum(h.nbytes for h in held) / 2**30:.2f} GiB in memory", flush=True)
PY
CG=/sys/fs/cgroup/memory/why-corpus-$$
mkdir $CG; echo 900M > $CG/memory.limit_in_bytes
cat > train.sh <<SH
#!/bin/bash
echo \$\$ > $CG/cgroup.procs
python preprocess.py
code=\$?
echo "preprocess.py exited with code \$code"
exit \$code
SH
bash train.sh
rmdir $CG
