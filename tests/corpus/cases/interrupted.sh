# Ctrl-C.
# expect: unknown
# how: shell
python shards.py 2 100
env --default-signal=INT torchrun --nproc_per_node 2 --master_port 29657 pretrain.py --steps 100000 > run.txt 2>&1 &
while ! grep -q 'step 10 ' run.txt; do sleep 1; done
kill -INT $!; wait
cat run.txt
