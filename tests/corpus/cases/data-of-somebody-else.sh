# Files that another user keeps to themselves; without root's right to read everything.
# expect: permission
# how: shell
python shards.py 2 100
chmod 600 data/*; chown 1234 data/*
setpriv --bounding-set=-dac_override,-dac_read_search --inh-caps=-dac_override,-dac_read_search \
  torchrun --nproc_per_node 2 --master_port 29620 pretrain.py --steps 40
