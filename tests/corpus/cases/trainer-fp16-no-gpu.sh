# expect: gpu_missing
# how: shell
cat > finetune.py <<'PY'
from transformers import TrainingArguments

TrainingArguments("out", bf16=False, fp16=True, report_to=[])
import torch
from accelerate import Accelerator

accelerator = Accelerator(mixed_precision="fp16")
scaler = torch.amp.GradScaler("cuda")
model = torch.nn.Linear(8, 8).to("cuda:0")
PY
accelerate launch --num_processes 1 --num_machines 1 --mixed_precision fp16 --dynamo_backend no finetune.py
