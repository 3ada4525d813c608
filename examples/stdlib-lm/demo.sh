#!/bin/sh
# The demo: two local nodes, a byte-level language model on Python's own source, then all is taken down.
# `make demo` runs it; BIN names the directory that raylaunch is installed in.
set -eu
here=$(dirname "$0")
raylaunch="${BIN:-.venv/bin}/raylaunch"
name=demo-$$
trap '"$raylaunch" down "$name" > /dev/null 2>&1 || true' EXIT
"$raylaunch" up --name "$name" --backend local --nodes 2
"$raylaunch" train "$here/train.yaml" --cluster "$name" --run "$name"
"$raylaunch" status
"$raylaunch" logs "$name" --rank 0 -n 5
"$raylaunch" down "$name"
trap - EXIT
"${BIN:-.venv/bin}/python" - "$name" <<'PYTHON'
import sys
from pathlib import Path
from raylaunch.state import files
run = files.run_dir(files.default_state_dir(), sys.argv[1])
losses = [row["loss"] for row in files.read_lines(run / "metrics.jsonl") if "loss" in row]
print(f"\nloss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps; the run lies in {run}")
print("  config.yaml  metrics.jsonl  events.jsonl  checkpoints/  attempts/0001/rank-0.log")
sys.exit(0 if losses[-1] < 0.6 * losses[0] else "the loss did not fall as it should")
PYTHON
