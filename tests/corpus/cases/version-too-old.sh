# expect: import_error
# how: shell
cat > finetune.py <<'PY'
import torch
from transformers.utils.versions import require_version

require_version("tokenizers>=0.99.1,<1.0", "To fix: pip install -r requirements.txt")
print(torch.__version__)
PY
torchrun --nproc_per_node 2 --master_port 29635 finetune.py
