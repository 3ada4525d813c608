# A name that a newer release of the library no longer has.
# expect: import_error
# how: shell
cat > finetune.py <<'PY'
from transformers import AutoModelForCausalLM, AdamW

print(AutoModelForCausalLM, AdamW)
PY
python finetune.py 2>&1 | tee train.log
