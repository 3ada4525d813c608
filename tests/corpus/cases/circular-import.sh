# expect: import_error
# how: shell
mkdir -p lab
echo 'from lab.optim import build_optimizer

class Model: pass' > lab/model.py
echo 'from lab.model import Model

def build_optimizer(model: Model): return None' > lab/optim.py
touch lab/__init__.py
echo 'from lab.model import Model
print(Model)' > train.py
torchrun --nproc_per_node 2 --master_port 29634 train.py
