# A user's function in the Trainer of transformers.
# expect: python_exception
# how: shell
cat > finetune.py <<'PY'
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments

config = LlamaConfig(
    vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
)
rows = [{"input_ids": torch.randint(1, 200, (16,)), "labels": i % 2} for i in range(64)]


def compute_metrics(prediction):
    logits, labels = prediction
    return {"accuracy": (logits.argmax(-1) == labels).mean().round(4).tolist()["value"]}


trainer = Trainer(
    model=LlamaForSequenceClassification(config),
    args=TrainingArguments("out", max_steps=6, eval_strategy="steps", eval_steps=4, logging_steps=1, use_cpu=True, report_to=[]),
    train_dataset=rows,
    eval_dataset=rows[:16],
    compute_metrics=compute_metrics,
)
trainer.train()
PY
python finetune.py
