# expect: data_error
# how: shell
python shards.py 1 5000
gzip data/shard-0.jsonl; truncate -s 60000 data/shard-0.jsonl.gz
cat > tokenize_corpus.py <<'PY'
import gzip
import json

import numpy as np

count = 0
with gzip.open("data/shard-0.jsonl.gz", "rt") as lines:
    for number, line in enumerate(lines):
        count += len(np.array([ord(letter) for letter in json.loads(line)["text"]]))
        if number % 500 == 0:
            print(f"{number} documents, {count} tokens", flush=True)
PY
python tokenize_corpus.py
