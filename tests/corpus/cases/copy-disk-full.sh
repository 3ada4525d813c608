#!/bin/bash
# expect: disk_full
# how: sbatch -N1
set -e
python shards.py 2 20000
echo "staging data to node-local disk"
unshare -m bash -ec 'mkdir stage; mount -t tmpfs -o size=2m tmpfs stage; cp data/*.jsonl stage/; python pretrain.py --data stage'
