"""Every example of docs/training.md, run: as it is written, but for its size and where its data lie."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from attempts import ROOT, Run, prepared
from test_trainer_hf import a_qwen

from raylaunch.config import loader

pytestmark = pytest.mark.long

EXAMPLES = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
MOST = {"tp_size": 2, "cp_size": 2, "pp_size": 2, "ep_size": 2}
STEPS = {"max_steps": 4, "global_batch_size": 8, "local_batch_size": 2, "warmup_steps": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, str]:
    """What the examples name."""
    directory = tmp_path_factory.mktemp("shared")
    talk = directory / "talk.jsonl"
    talk.write_text('{"prompt": "two and two?", "completion": "four"}\n' * 200)
    return {
        "tokens": prepared(text, directory / "tokens"),
        "chats": prepared(talk, directory / "chats", format="sft"),
        "model": str(a_qwen(directory / "qwen")),
    }


def small(written: dict[str, Any], made: dict[str, str]) -> dict[str, Any]:
    """The example, as far as this machine can."""
    config = {name: dict(section) for name, section in written.items() if name not in ("slurm", "wandb", "mlflow")}
    model = config.get("model", {})
    if "hf" in model:
        model["hf"] = made["model"]
    elif "_target_" in model:
        config["model"] = {"_target_": "own_models:Tied", "width": 32, "vocab_size": 264, "layers": 2}
    else:
        config["model"] = model | {"size": "tiny", "vocab_size": 264}
    data = config.setdefault("data", {}) | {"seq_len": 32}
    if "prepared" in data:
        data["prepared"] = made["chats" if "chats" in data["prepared"] else "tokens"]
    if "mixture" in data:
        places = [Path(made["tokens"]), *(Path(made["tokens"] + f"-{n}") for n in (1, 2))]
        for place in places[1:]:
            if not place.exists():
                place.symlink_to(places[0])
        data["mixture"] = dict(zip(map(str, places), data["mixture"].values(), strict=True))
    if "validation" in data:
        data["validation"] = made["tokens"]
    config["data"] = data
    plan = config.get("distributed", {})
    plan |= {key: min(value, MOST[key]) for key, value in plan.items() if key in MOST}
    steps = config.get("step_scheduler", {})
    steps |= {key: min(value, 2) for key, value in steps.items() if key in ("ckpt_every_steps", "val_every_steps")}
    config["step_scheduler"] = steps | STEPS
    checkpoint = config.get("checkpoint", {})
    checkpoint.pop("checkpoint_dir", None)
    if "profile_steps" in config.get("logging", {}):
        config["logging"] |= {"profile_steps": [2, 3], "log_every_steps": 1}
    return config


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("example", range(len(EXAMPLES)))
def test_an_example_trains(run: Run, made: dict[str, str], tmp_path: Path, example: int) -> None:
    config = small(yaml.safe_load(EXAMPLES[example]), made)
    (tmp_path / "example.yaml").write_text(yaml.safe_dump(config))
    run.config = loader.load(tmp_path / "example.yaml", user_file=None).model_dump()
    run.train(4 if MOST.keys() & config.get("distributed", {}).keys() else 2)
    losses = run.metrics("loss")
    assert sorted(losses) == [1, 2, 3, 4] and all(0 < loss < 8 for loss in losses.values())
