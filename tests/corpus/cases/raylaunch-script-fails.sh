# A torchrun script under raylaunch; what `raylaunch train` and `raylaunch logs` print.
# expect: python_exception rank=1
# how: login
export RAYLAUNCH_STATE_DIR=$PWD/state PYTHONPATH=$CHECKOUT
ray() { python -c "from raylaunch.cli import main; main()" "$@"; }
python shards.py 2 100
echo '{"txt": "misspelt"}' >> data/shard-1.jsonl
echo "{trainer: {script: $PWD/pretrain.py, args: [--data, $PWD/data, --steps, '60', --save-dir, $PWD/checkpoints]}}" > run.yaml
ray up --backend local --nodes 2 >/dev/null 2>&1
ray train run.yaml --run first
ray logs first
ray down --all >/dev/null 2>&1
