#!/bin/bash
# expect: permission
# how: sbatch -N1
set -e
mkdir project && chmod 555 project && chown 1234 project
RUN="setpriv --bounding-set=-dac_override,-dac_read_search,-fowner --inh-caps=-dac_override,-dac_read_search,-fowner"
$RUN mkdir -p project/checkpoints/run-7
srun $RUN python pretrain.py --save-dir project/checkpoints/run-7
