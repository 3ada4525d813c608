# The master's node is cut off from the others.
# expect: network_setup
# how: login
python shards.py 2 100
cat > one.sh <<'SH'
export MASTER_ADDR=node3 MASTER_PORT=29507 WORLD_SIZE=2 RANK=1
python pretrain.py --timeout 6
SH
sandbox="python $CHECKOUT/tests/corpus/programs/sandbox.py"
$sandbox cut node3
srun -w node1 -N1 bash one.sh
$sandbox heal node3
while [ "$(sinfo -h -n node3 -p main -o %T)" != idle ]; do sleep 1; done
