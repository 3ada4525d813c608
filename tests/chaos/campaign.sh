#!/bin/sh
# `make long-campaign`: COUNT random faults with one SEED, spread over the matrix, on a sandbox of its own; the ledger
# and the picture stay in OUT. Needs root.   campaign.sh COUNT SEED
set -eu
count=$1 seed=$2 name=campaign-$$
raylaunch="${BIN:-.venv/bin}/raylaunch"
out=${OUT:-/var/tmp/raylaunch-campaign}
began=$(date +%s)
mkdir -p "$out"
trap '"$raylaunch" sandbox down --name "$name"' EXIT
"$raylaunch" sandbox up --name "$name" --nodes 5 --cpus 4
eval "$("$raylaunch" sandbox env --name "$name")"
cat > "$out/run.yaml" <<YAML
slurm: {nodes: 4, mem: 3G}
elastic: {min_nodes: 1, max_nodes: 4, max_strikes: 1000, scale_up_delay: 2, hang_timeout: 15}
model: {size: tiny}
data: {seq_len: 64}
step_scheduler: {max_steps: 1000000, global_batch_size: 12, local_batch_size: 1, ckpt_every_steps: 10, val_every_steps: 0}
YAML
"$raylaunch" up -c "$out/run.yaml"
"$raylaunch" train "$out/run.yaml" --run campaign --detach
status=0
"$raylaunch" chaos campaign --count "$count" --seed "$seed" --every 3s --limit 5m --hold 8s \
    --faults worker,node,head,freeze,cut,raylet,agent,driver,gcs,dashboard,slurmd,slurmctld,drain,hang \
    --json "$out/ledger.json" --plot "$out/run.png" || status=$?
"$raylaunch" status
"$raylaunch" down
cp -r "$RAYLAUNCH_STATE_DIR/runs/campaign/events.jsonl" "$RAYLAUNCH_STATE_DIR/runs/campaign/metrics.jsonl" \
    "$RAYLAUNCH_STATE_DIR"/clusters/main/events.jsonl "$out/" 2> /dev/null || true
echo "long-campaign: $(($(date +%s) - began)) s"
exit $status
