"""Writes COUNT shards of ROWS lines of JSON into data/."""

import json
import random
import sys
from pathlib import Path

count, rows = (int(word) for word in sys.argv[1:3])
source = random.Random(0)
Path("data").mkdir(exist_ok=True)
for number in range(count):
    with Path(f"data/shard-{number}.jsonl").open("w") as out:
        for _ in range(rows):
            text = "".join(source.choice("abcdefgh ") for _ in range(64))
            out.write(json.dumps({"text": text, "source": "web", "score": round(source.random(), 3)}) + "\n")
