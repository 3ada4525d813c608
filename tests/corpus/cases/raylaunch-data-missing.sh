# raylaunch's own trainer, a file of its data cut off.
# expect: data_error
# how: login
export RAYLAUNCH_STATE_DIR=$PWD/state PYTHONPATH=$CHECKOUT
ray() { python -c "from raylaunch.cli import main; main()" "$@"; }
python shards.py 1 2000
mkdir tokens
ray data prepare data --out tokens/all >/dev/null 2>&1
for shard in $(find tokens -name '*.arrow'); do truncate -s 3000 $shard; done
printf 'trainer: trainers.fsdp:train\nmodel: {size: 1M}\ndata: {prepared: %s, seq_len: 64}\nstep_scheduler: {max_steps: 20, ckpt_every_steps: 10, global_batch_size: 8, local_batch_size: 4}\n' $PWD/tokens/all > run.yaml
ray up --backend local --nodes 2 >/dev/null 2>&1
ray train run.yaml --run third
ray logs third
ray down --all >/dev/null 2>&1
