# The tokenizer knows more tokens than the model.
# expect: mismatch
# how: shell
python shards.py 2 100
torchrun --nproc_per_node 2 --master_port 29648 pretrain.py --steps 20 >/dev/null 2>&1
cat > generate.py <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(vocab_size=32000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)
tokens = torch.randint(0, 32064, (2, 2048))
print(model(input_ids=tokens, labels=tokens).loss)
PY
python generate.py
