"""`raylaunch plan` beside the real thing: the parameters of the real models, the tensor bytes of real training steps."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from raylaunch.config.schema import SIZES, Config
from raylaunch.state import files
from raylaunch.tools.plan import memory, model_shape, sharding
from raylaunch.trainers import models, parallel

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240.0  # of a machine that is busy with other things

SMALL = {"dim": 128, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 512}
WIDE = {"dim": 192, "n_layers": 8, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 768, "vocab_size": 1024}
DEEP = SMALL | {"n_layers": 6}
EXPERTS = SMALL | {"n_layers": 2, "ffn_dim": 256, "n_experts": 4, "n_experts_per_token": 2}

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    # activations are the most of it
    "dense": (1, {"model": SMALL}),
    "selective": (1, {"model": SMALL, "distributed": {"activation_checkpointing": "selective"}}),
    "full": (1, {"model": SMALL, "distributed": {"activation_checkpointing": "full"}}),
    "bfloat16": (1, {"model": SMALL, "distributed": {"dtype": "bfloat16"}}),
    "documents": (1, {"model": SMALL, "data": {"document_mask": True}}),
    "experts": (1, {"model": EXPERTS}),
    "tensor parallel": (2, {"model": DEEP, "rows": 4, "batch": 4, "distributed": {"tp_size": 2}}),
    "context parallel": (2, {"model": DEEP, "rows": 4, "batch": 4, "distributed": {"cp_size": 2}}),
    "pipeline": (2, {"model": DEEP, "rows": 4, "batch": 16, "distributed": {"pp_size": 2}}),
    "expert parallel": (2, {"model": EXPERTS | {"n_layers": 6}, "rows": 4, "distributed": {"ep_size": 2}}),
    # logits are
    "logits": (1, {"model": SMALL | {"vocab_size": 4096}, "rows": 4}),
    # parameters, gradients and states are
    "sharded": (2, {"model": WIDE, "rows": 1, "tokens": 32}),
    "replicated": (2, {"model": WIDE, "rows": 1, "tokens": 32, "distributed": {"strategy": "ddp"}}),
    "several passes": (2, {"model": WIDE, "rows": 1, "batch": 4, "tokens": 32}),
    "block by block": (2, {"model": WIDE, "rows": 1, "tokens": 32, "gathered_bytes": 0}),
    "moving average": (1, {"model": WIDE, "rows": 1, "tokens": 32, "optimizer": {"ema": 0.9}}),
    "padded experts": (2, {"model": EXPERTS | {"n_experts": 3, "ffn_dim": 768}, "rows": 1, "tokens": 32}),
}

GATE = {"dense", "experts", "tensor parallel", "logits", "sharded"}
"""One of each kind; the others are for `make test-long`."""


class Workers:
    """Two processes that train the cases."""

    def __init__(self, log: IO[bytes]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("peak_worker.py"))]
        pipe = subprocess.PIPE
        self._processes = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdin=pipe, stdout=pipe, stderr=log)
            for rank in range(2)
        ]

    def run(self, case: dict[str, Any]) -> list[list[tuple[int, int]]]:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(case).encode() + b"\n")
            process.stdin.flush()
        answers = [self._answer(process) for process in self._processes][: case["world"]]
        assert not any("error" in answer for answer in answers), answers
        return [answer["peaks"] for answer in answers]

    def _answer(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], SECONDS)[0], "no answer in time"
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer

    def close(self) -> None:
        for process in self._processes:
            with process:  # closes its pipes
                process.kill()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with (tmp_path_factory.mktemp("peaks") / "stderr.log").open("wb") as log:
        workers = Workers(log)
        yield workers
        workers.close()


def most_of(steps: list[tuple[int, int]], world: int) -> int:
    """The most bytes of any step. Of two workers the step with the least counts, beside what was there at the first's
    beginning: of what gloo's thread releases the profiler sees not all, the less the busier the machine."""
    if world == 1:
        return max(most for _, most in steps)
    return min(most - begin for begin, most in steps) + steps[0][0]


@pytest.mark.parametrize(
    "name", [name if name in GATE else pytest.param(name, marks=pytest.mark.long) for name in CASES]
)
def test_the_modelled_peak_is_the_real_one(
    pair: Workers, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Within 10%."""
    world, more = CASES[name]
    rows = more.get("rows", 8)
    config = Config.model_validate({
        "model": more["model"],
        "data": {"text": [str(text)], "seq_len": more.get("tokens", 256), **more.get("data", {})},
        "distributed": more.get("distributed", {}),
        "optimizer": more.get("optimizer", {}),
        "step_scheduler": {
            "local_batch_size": rows, "global_batch_size": more.get("batch", rows * world), "max_steps": 3,
            "ckpt_every_steps": 100, "val_every_steps": 0,
        },
    })  # fmt: skip
    gathered = more.get("gathered_bytes", sharding.GATHERED_BYTES)
    files.make_dir(files.attempt_dir(tmp_path, 1))
    case = {
        "config": config.model_dump(), "world": world, "gathered_bytes": gathered, "directory": str(tmp_path),
        "rendezvous": str(tmp_path / "rendezvous"),
    }  # fmt: skip
    seen = pair.run(case)
    if name == "expert parallel":  # one worker's experts get more tokens than the other's: modelled is the mean
        measured = sum(most_of(steps[:1], world) for steps in seen) // world
    else:
        measured = max(most_of(steps, world) for steps in seen)
    monkeypatch.setattr(sharding, "GATHERED_BYTES", gathered)
    where = sharding.place(config, 1, world)
    modelled = memory.peak(config, model_shape.of(config), where, on_gpu=False, masked=bool(config.data.document_mask))
    print(f"| {name} | {measured / 1e6:.1f} | {modelled.total / 1e6:.1f} | {modelled.total / measured - 1:+.1%} |")
    assert modelled.total == pytest.approx(measured, rel=0.1), modelled


@pytest.mark.parametrize("model", [*({"size": size} for size in SIZES), {"size": "125M", "n_experts": 8}], ids=str)
def test_parameters_are_those_of_the_real_model(model: dict[str, Any]) -> None:
    config = Config.model_validate({"model": model | {"vocab_size": 128256}})
    with torch.device("meta"):
        real = models.make(config)
    assert model_shape.of(config).parameters["total"] == sum(p.numel() for p in real.parameters())


@pytest.mark.long
@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen2Config", "Qwen3Config", "MistralConfig"])
@pytest.mark.parametrize("lora", [0, 4])
def test_parameters_are_those_of_transformers(tmp_path: Path, kind: str, lora: int) -> None:
    import transformers

    tied = kind.startswith("Qwen")
    getattr(transformers, kind)(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, head_dim=32, tie_word_embeddings=tied, dtype="bfloat16",
    ).save_pretrained(tmp_path)  # fmt: skip
    config = Config.model_validate({"model": {"hf": str(tmp_path), "hf_init": "random", "lora": {"rank": lora}}})
    with torch.device("meta"):
        real = models.make(config)
    own = model_shape.of(config)
    assert own.parameters["total"] == sum(p.numel() for p in real.parameters())
    trained = [p for p in real.parameters() if p.requires_grad]
    assert own.parameters["trained"] == sum(p.numel() for p in trained)
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.itemsize for p in real.parameters() if not p.requires_grad} <= {own.frozen_width}


def test_copies_and_limits_are_the_trainers() -> None:
    assert sharding.GATHERED_BYTES == parallel.GATHERED_BYTES
    for strategy in ("ddp", "fsdp", "hsdp"):
        for tp, ep, nodes, workers in ((1, 1, 4, 8), (2, 1, 2, 4), (4, 1, 3, 8), (1, 4, 2, 8)):
            model = {"n_experts": 8} if ep > 1 else {"n_kv_heads": 4}
            plan = {"strategy": strategy, "tp_size": tp, "ep_size": ep}
            config = Config.model_validate({"model": model, "distributed": plan})
            real = parallel.copies(strategy, nodes * workers, workers, config.distributed.model_parallel)
            assert sharding.place(config, nodes, workers).replicas == real
            assert (
                parallel.MeshCoordinates.of(config, 0, nodes * workers).data[1]
                == sharding.place(config, nodes, workers).samples
            )
