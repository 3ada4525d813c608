# expect: port_in_use
# how: shell
python -m http.server 29631 --bind :: >/dev/null 2>&1 &
sleep 3
python shards.py 2 100
torchrun --nproc_per_node 2 --master_port 29631 pretrain.py
kill $!
