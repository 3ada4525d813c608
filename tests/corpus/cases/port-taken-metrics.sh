# Two runs on one node want the port of their metrics.
# expect: port_in_use rank=0
# how: shell
python -m http.server 9109 >/dev/null 2>&1 &
sleep 3
cat > train.py <<'PY'
import http.server
import threading

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
if dist.get_rank() == 0:
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 9109), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
for step in range(100):
    value = torch.ones(8)
    dist.all_reduce(value)
print("done")
PY
torchrun --nproc_per_node 2 --master_port 29632 train.py
kill $!
