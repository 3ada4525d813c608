"""`raylaunch plan`: the arithmetic. Beside real training it stands in tests/integration/test_plan.py."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from test_slurm_client import SINFO, Fake, refused

from raylaunch.cli import cli
from raylaunch.config.schema import Config
from raylaunch.errors import RaylaunchError, RunError, UsageError
from raylaunch.scheduler.slurm.client import Completed, Slurm
from raylaunch.tools.plan import (
    alternatives,
    checkpoint_size,
    cpu_memory,
    estimate,
    from_run,
    gpu_models,
    memory,
    model_shape,
    queue_time,
    sharding,
    throughput,
)
from raylaunch.tools.plan.estimate import Given

H100 = gpu_models.find("h100-80gb")
LLAMA = {"size": "8B", "vocab_size": 128256}


def config(**sections: Any) -> Config:
    return Config.model_validate(sections)


def peak(made: Config, nodes: int = 1, workers: int = 8, *, on_gpu: bool = True) -> memory.Peak:
    return memory.peak(made, model_shape.of(made), sharding.place(made, nodes, workers), on_gpu=on_gpu)


def steps(rows: int, batch: int, **more: Any) -> dict[str, Any]:
    return {"local_batch_size": rows, "global_batch_size": batch, **more}


# -- what there is -------------------------------------------------------------------------------------------


def test_a_gpu_is_found_by_its_name_or_the_part_that_is_its_own() -> None:
    assert gpu_models.find("H100-80GB") is H100 and gpu_models.find("h100") is H100
    with pytest.raises(UsageError, match="ambiguous, one of a100-40gb, a100-80gb"):
        gpu_models.find("a100")
    with pytest.raises(UsageError) as error:
        gpu_models.find("h300")
    assert "mi300x-192gb" in error.value.hint and "cpu" in error.value.hint
    assert gpu_models.asked_for("h100:8") is H100 and gpu_models.asked_for("gpu:h100:4,shard:2") is H100
    assert gpu_models.asked_for("a100:8") is gpu_models.asked_for("8") is gpu_models.asked_for("gpu:2") is None
    assert len(gpu_models.TABLE) > 12 and all(
        gpu.memory and gpu.flops for gpu in gpu_models.TABLE.values() if gpu is not gpu_models.CPU
    )


def test_llama_3_has_as_many_parameters_as_it_is_said_to_have() -> None:
    assert model_shape.of(config(model=LLAMA)).parameters["total"] == 8_030_261_248


def test_models_whose_shape_is_not_known() -> None:
    for sections, words in (
        ({"model": {"target": "a.b:C"}}, "custom models"),
        ({"trainer": {"script": "train.py"}}, "custom trainers"),
        ({"trainer": {"function": "mine:train"}}, "custom trainers"),
        ({"model": {"hf": "Qwen/Qwen3-8B"}}, "not a directory"),
    ):
        with pytest.raises(RunError, match=words):
            model_shape.of(config(**sections))


QWEN = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 300}  # fmt: skip


def test_a_directory_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN | {"tie_word_embeddings": True, "dtype": "bfloat16"}))
    found = model_shape.of(config(model={"hf": str(tmp_path), "lora": {"rank": 4}}))
    assert (found.q_dim, found.tied, found.head_norms, found.frozen_width) == (128, True, True, 2)
    assert 0 < found.parameters["trained"] < found.parameters["total"] / 3


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", '{"model_type": "gpt2"}', json.dumps(QWEN | {"hidden_size": None}), '{"model_type": 3}',
     json.dumps(QWEN | {"num_attention_heads": 0, "head_dim": None}), "\0\0", '{"model_type": "llama", "hidden_size": "x"}'],
)  # fmt: skip
def test_a_broken_config_of_transformers_is_a_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError):
        model_shape.of(config(model={"hf": str(tmp_path)}))
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(RunError):
        model_shape.of(config(model={"hf": str(tmp_path)}))


# -- where it lies -------------------------------------------------------------------------------------------


def test_nodes_that_the_plan_cannot_share_are_spares() -> None:
    made = config(distributed={"tp_size": 8, "pp_size": 2}, model=LLAMA)
    assert sharding.place(made, 5, 8).spare == 1 and sharding.place(made, 5, 8).world == 32
    with pytest.raises(UsageError, match="fewer than the 16"):
        sharding.place(made, 1, 8)
    with pytest.raises(UsageError, match="hsdp"):
        sharding.place(config(distributed={"strategy": "hsdp", "tp_size": 4, "pp_size": 2}, model=LLAMA), 4, 2)


def test_passes_are_those_of_the_loader() -> None:
    made = config(step_scheduler=steps(2, 64))
    assert [sharding.place(made, nodes, 8).passes for nodes in (1, 2, 4, 5)] == [4, 2, 1, 1]
    assert sharding.place(config(step_scheduler={"local_batch_size": 2, "grad_acc_steps": 3}), 2, 8).passes == 3


def test_fsdp_pads_a_few_experts_over_many_shards() -> None:
    """Eight experts over 64 shards: each worker has one, and gathered they are 64."""
    made = config(model={"size": "125M", "n_experts": 8})
    [stage] = sharding.stages(made, model_shape.of(made), sharding.place(made, 8, 8), 2)
    experts = stage.block[0].of_experts(True)
    assert experts.shard() == 3 * 768 * 2048 and experts.whole() == 8 * experts.own()


def test_experts_are_divided_by_ep_size_alone() -> None:
    model = {"size": "125M", "n_experts": 8, "vocab_size": 1024}
    one, four = (config(model=model, distributed={"ep_size": ep, "strategy": "ddp"}) for ep in (1, 4))
    of_one, of_four = (peak(made, 1, 8).bytes["experts"] for made in (one, four))
    assert of_one == 12 * 8 * 3 * 768 * 2048 * 12 and of_four == of_one / 4


# -- memory --------------------------------------------------------------------------------------------------


def test_states_are_sixteen_bytes_a_parameter_and_shards_divide_them() -> None:
    parameters = model_shape.of(config(model=LLAMA)).parameters["total"]
    alone = peak(config(model=LLAMA, step_scheduler=steps(1, 1)), 1, 1).bytes
    many = peak(config(model=LLAMA, step_scheduler=steps(1, 64)), 8, 8).bytes
    assert alone["parameters"] == 4 * parameters and alone["optimizer"] == 8 * parameters
    assert many["optimizer"] == pytest.approx(8 * parameters / 64, rel=1e-3)


def test_activations_follow_the_tokens_and_are_less_when_computed_again() -> None:
    def activations(how: str, rows: int = 1) -> int:
        made = config(
            model=LLAMA, data={"seq_len": 4096}, distributed={"activation_checkpointing": how},
            step_scheduler=steps(rows, 64 * rows),
        )  # fmt: skip
        return peak(made, 8).bytes["activations"]

    assert activations("none", 2) == 2 * activations("none")
    assert activations("none") > 1.5 * activations("selective") > 4 * activations("full")


def test_more_passes_keep_whole_gradients() -> None:
    """They are exchanged with the last micro-batch only: until then each worker has them whole, in float32."""
    one, two = (peak(config(model=LLAMA, step_scheduler=steps(1, batch)), 8).bytes for batch in (64, 128))
    assert two["gradients"] > 4 * 8.0e9 > 4 * one["gradients"]


def test_what_is_offloaded_lies_on_the_host() -> None:
    there, away = (peak(config(model=LLAMA, distributed={"cpu_offload": off})) for off in (False, True))
    assert there.bytes["optimizer"] > 0 == away.bytes["optimizer"] and away.host > there.host == 0
    assert peak(config(model=LLAMA, checkpoint={"async_save": True})).host == pytest.approx(12 * 8.03e9 / 8, rel=1e-3)


def test_stages_of_a_pipeline_share_the_blocks_and_the_first_holds_most_micro_batches() -> None:
    made = config(model=LLAMA, distributed={"pp_size": 4}, step_scheduler=steps(1, 32), data={"seq_len": 2048})
    whole = config(model=LLAMA, step_scheduler=steps(1, 32), data={"seq_len": 2048})
    assert peak(made).bytes["optimizer"] < 0.3 * 4 * peak(whole).bytes["optimizer"]
    assert peak(made).stage in {0, 3}


# -- time ----------------------------------------------------------------------------------------------------


def test_the_assumed_pace_is_that_of_torchtitan() -> None:
    made = config(model=LLAMA, data={"seq_len": 8192}, step_scheduler=steps(1, 8))
    found = throughput.assumed(made, model_shape.of(made), sharding.place(made, 1, 8), H100, None)
    assert found is not None and found.assumed and found.tokens_per_s / 8 == pytest.approx(5762, rel=0.01)
    assert throughput.assumed(made, model_shape.of(made), sharding.place(made, 1, 8), gpu_models.CPU, None) is None


def test_recomputing_and_a_pipelines_idle_ends_take_time() -> None:
    def rate(**plan: Any) -> float:
        made = config(model=LLAMA, distributed=plan, step_scheduler=steps(1, 32))
        found = throughput.assumed(made, model_shape.of(made), sharding.place(made, 1, 8), H100, 0.4)
        assert found is not None
        return found.tokens_per_s

    assert rate(activation_checkpointing="full") == pytest.approx(rate() * 3 / 4)
    assert rate(pp_size=4) == pytest.approx(rate() / (1 + 3 / 16))


def test_youngs_and_dalys_interval() -> None:
    assert checkpoint_size.young(60, 86400) == pytest.approx(3220, abs=1)
    assert checkpoint_size.daly(60, 86400) == pytest.approx(3180, abs=1)  # a little less the save itself
    assert checkpoint_size.daly(1, 1e9) == pytest.approx(checkpoint_size.young(1, 1e9), rel=1e-4)
    assert checkpoint_size.daly(500, 200) == 200
    around = [checkpoint_size.waste(checkpoint_size.daly(60, 86400) * part, 60, 86400) for part in (0.5, 1, 2)]
    assert around[1] < min(around[0], around[2])


def test_a_save_is_as_large_as_what_is_trained() -> None:
    assert checkpoint_size.size(config(model=LLAMA), model_shape.of(config(model=LLAMA))) == 12 * 8_030_261_248
    with_average = config(model=LLAMA, optimizer={"ema": 0.999})
    assert checkpoint_size.size(with_average, model_shape.of(with_average)) == 16 * 8_030_261_248


def saves(nodes: int = 64, **checkpoint: Any) -> checkpoint_size.Saving:
    made = config(model=LLAMA, checkpoint=checkpoint, step_scheduler={"ckpt_every_steps": 100})
    return checkpoint_size.plan(made, model_shape.of(made), nodes, nodes * 8, 2e9, checkpoint_size.FAILURES, 2.0, 1e6)


def test_in_the_background_steps_wait_for_the_copy_alone() -> None:
    assert saves().stall == saves().save == pytest.approx(48.2, abs=0.1)
    assert saves(async_save=True).stall < 0.1 and saves(async_save=True).interval >= saves().save
    assert saves(512).mtbf == saves(64).mtbf / 8 and saves(512).interval < saves(64).interval


# -- what would fit ------------------------------------------------------------------------------------------


def looked_for(made: Config) -> list[alternatives.Fit]:
    assert H100.memory is not None
    return alternatives.search(made, model_shape.of(made), sharding.place(made, 4, 8), H100.memory, on_gpu=True)


def test_what_is_proposed_fits_with_the_same_global_batch() -> None:
    made = config(model=LLAMA, data={"seq_len": 8192}, step_scheduler=steps(2, 64))
    found = looked_for(made)
    assert found and [fit.slower for fit in found] == sorted(fit.slower for fit in found)
    for fit in found:
        values = made.model_dump()
        for key, value in fit.changes.items():
            section, name = key.split(".")
            values[section][name] = value
        changed = Config.model_validate(values)
        assert changed.step_scheduler.global_batch_size == 64
        again = peak(changed, fit.nodes).total
        assert again == fit.total <= alternatives.ROOM * (H100.memory or 0)
    kinds = [fit.changes.keys() for fit in found]
    assert not any(a <= b for a, b in itertools.combinations(kinds, 2))  # none only adds to one before it


def test_a_global_batch_that_is_not_written_is_pinned() -> None:
    made = config(model=LLAMA, data={"seq_len": 8192}, step_scheduler={"local_batch_size": 2})
    assert all(fit.changes["step_scheduler.global_batch_size"] == 64 for fit in looked_for(made))


def test_more_nodes_where_no_plan_fits_and_nothing_where_those_do_not_help() -> None:
    made = config(model=LLAMA, data={"seq_len": 512}, step_scheduler=steps(1, 64))
    alone = sharding.place(made, 1, 1)
    [found] = alternatives.search(made, model_shape.of(made), alone, 64 << 30, on_gpu=False)
    assert found.nodes > 1 and found.total <= 64 << 30
    assert not alternatives.search(made, model_shape.of(made), alone, 1 << 30, on_gpu=False)


# -- like an earlier run -------------------------------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "earlier"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("model: {size: 125M}\nstep_scheduler: {global_batch_size: 16}\n")
    rows = [{"step": n, "loss": 1.0, "tokens_per_s": 1000.0 * n, "world_size": 2, "attempt": 1} for n in (1, 2, 3)]
    events = [
        {"time": 10.0, "kind": "attempt_started", "attempt": 1, "workers": 2, "from_step": 0},
        {"time": 14.0, "kind": "workers_connected", "attempt": 1}, {"time": 15.0, "kind": "model_built", "attempt": 1},
        {"time": 17.0, "kind": "first_step", "attempt": 1}, {"time": 20.0, "kind": "commit", "seconds": 2.0, "step": 3},
    ]  # fmt: skip
    for name, lines in (("metrics", rows), ("events", events)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_an_earlier_run_gives_pace_start_and_saves(earlier: Path) -> None:
    found = from_run.read(earlier)
    assert (found.tokens_per_s, found.workers) == (2000.0, 2)
    assert found.start == {"workers": 4.0, "model": 1.0, "step": 2.0}
    made = config(model={"size": "125M"}, step_scheduler={"global_batch_size": 16})
    assert found.bandwidth == checkpoint_size.size(made, model_shape.of(made)) / 2
    same = found.pace(made, model_shape.of(made), sharding.place(made, 1, 2))
    assert same.tokens_per_s == pytest.approx(2000) and "by workers" not in same.how
    twice = found.pace(made, model_shape.of(made), sharding.place(made, 1, 4))
    assert twice.tokens_per_s == pytest.approx(4000) and "by workers" in twice.how
    assert found.pace(made, None, sharding.place(made, 1, 4)).tokens_per_s == pytest.approx(4000)


def test_an_earlier_run_that_is_damaged(earlier: Path) -> None:
    with (earlier / "metrics.jsonl").open("ab") as out:
        out.write(b'5\nnull\n{"tokens_per_s": NaN, "world_size": 2}\n\xff\xfe\n{"tokens_per_s": 5000, "world_si')
    (earlier / "events.jsonl").write_bytes(b'[]\n{"kind": "commit", "seconds": "x"}\n\0\0\n')
    found = from_run.read(earlier)
    assert found.tokens_per_s == 2000.0 and found.start == {} and found.bandwidth is None
    (earlier / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match="no step"):
        from_run.read(earlier)
    with pytest.raises(RunError, match="no such run"):
        from_run.read(earlier.with_name("other"))


# -- the room -------------------------------------------------------------------------------------------------

PARTITIONS = """PartitionName=main AllocNodes=ALL Default=YES DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED
PartitionName=fat AllocNodes=ALL Default=NO DefMemPerCPU=2048 MaxMemPerNode=UNLIMITED
PartitionName=thin AllocNodes=ALL Default=NO DefMemPerNode=1000 MaxMemPerNode=UNLIMITED
"""
SITE = "DefMemPerCPU            = 6026\n"


@pytest.mark.parametrize(
    ("slurm", "site", "mib", "why"),
    [
        ({}, SITE, 6026, "Slurm's DefMemPerCPU for 1 CPU per node"),
        ({"ntasks_per_node": 2, "cpus_per_task": 3}, SITE, 3 * 6026, "Slurm's DefMemPerCPU for 6 CPUs per node"),
        ({"partition": "fat", "nodes": "4"}, SITE, 2048, "Slurm's DefMemPerCPU for 1 CPU per node"),
        ({"partition": "thin"}, SITE, 1000, "Slurm's DefMemPerNode"),
        ({"exclusive": True}, SITE, 24105, "if the job uses whole nodes"),
        ({}, "", 24105, "if the job uses whole nodes"),
        ({"mem": "0"}, SITE, 24105, "if the job uses whole nodes"),
        ({"mem": "3G"}, SITE, 3072, "slurm.mem"),
        ({"extra": ["--mem-per-cpu", "1G"], "cpus_per_task": 2}, SITE, 2048, "--mem-per-cpu for 2 CPUs per node"),
        ({"partition": "none"}, "", None, ""),
    ],
)
def test_a_worker_has_what_slurm_gives_the_job(slurm: dict[str, Any], site: str, mib: int | None, why: str) -> None:
    fake = Fake(sbatch=Completed(0), sinfo=SINFO, scontrol=Completed(0, PARTITIONS + site))
    found = cpu_memory.of_worker(gpu_models.CPU, config(slurm=slurm), Slurm(fake))
    assert found == cpu_memory.Room(mib and mib << 20, why)


def test_where_slurm_does_not_say() -> None:
    """None here: this machine is the node. One that does not answer: nobody knows."""
    found = cpu_memory.of_worker(gpu_models.CPU, config(), Slurm(Fake(sbatch=FileNotFoundError(2, "no"))))
    assert found.size and found.why == "this machine"
    silent = Fake(sbatch=Completed(0), scontrol=refused("slurm_load_partitions: Unable to contact slurm controller\n"))
    assert cpu_memory.of_worker(gpu_models.CPU, config(), Slurm(silent)) == cpu_memory.Room(None)
    assert cpu_memory.of_worker(H100, config(), Slurm(silent)) == cpu_memory.Room(H100.memory)


# -- the queue -----------------------------------------------------------------------------------------------

NOW = datetime(2026, 11, 21, 12, 0).astimezone()
SAID = "sbatch: Job 7 to start at 2026-11-21T13:30:00 using 4 processors on nodes node[1-4] in partition main\n"


def asked(answer: Completed | Exception, **sections: Any) -> tuple[queue_time.Queue, Fake]:
    fake = Fake(sbatch=answer, sinfo=SINFO)
    return queue_time.estimate(config(**sections), Slurm(fake), NOW), fake


def test_the_queue() -> None:
    found, fake = asked(Completed(0, "", SAID))
    assert found.state == "estimated" and "2026-11-21 13:30, in 90 min" in found.text
    assert fake.commands[-1] == ["sbatch", "--test-only"]
    assert asked(Completed(0, "", "sbatch: fine\n"))[0].state == "unknown"
    assert asked(FileNotFoundError(2, "no"))[0].state == "absent"
    local, fake = asked(Completed(0), cluster={"backend": "local"})
    assert local.state == "absent" and not fake.commands


def test_a_job_that_slurm_refuses_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slurm, "available", lambda _: True)
    found, _ = asked(refused("sbatch: error: invalid partition specified: nope\n"), slurm={"partition": "nope"})
    assert found.state == "refused" and "Set slurm.partition" in found.text and "\n" not in found.text
    found, _ = asked(refused("sbatch: error: Unable to contact slurm controller (connect failure)\n"))
    assert found.state == "unavailable"


# -- the command ---------------------------------------------------------------------------------------------

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm

    def run(text: str, *options: str) -> Result:
        path = tmp_path / "train.yaml"
        path.write_text(text)
        return CliRunner().invoke(
            cli, ["plan", str(path), "--state-dir", str(tmp_path), *options], standalone_mode=False
        )

    return run


EIGHT = "slurm: {nodes: 4, gpus_per_node: 8}\nmodel: {size: 8B, vocab_size: 128256}\ndata: {seq_len: 8192}\n"


def test_what_it_says(run: Run) -> None:
    shown = run(EIGHT, "--gpu", "h100-80gb", "--set", "step_scheduler.local_batch_size=1")
    assert shown.return_value == 0 and "fits: 61." in shown.output and "Young/Daly" in shown.output
    assert "Slurm is not available" in shown.output and "assumed: 34% of 989 TFLOP/s" in shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    shown = run(EIGHT, "--gpu", "h100-80gb", "--set", "step_scheduler.local_batch_size=2")
    assert shown.return_value == 1 and "does not fit: 116.6 of 79.1 GiB; changes that make it fit:" in shown.output
    assert "\nassuming that it fits:\nthroughput " in shown.output
    typed = EIGHT.replace("gpus_per_node: 8", "gpus_per_node: 'h100:8'")
    assert "on h100-80gb" in run(typed, "--nodes", "8", "--gpus-per-node", "4").output


def test_forty_columns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylaunch.cli.plan.table_width", lambda: 40)
    shown = run(EIGHT, "--gpu", "h100", "--set", "step_scheduler.local_batch_size=4")
    assert shown.return_value == 1 and max(map(len, shown.output.splitlines())) <= 40


def test_json(run: Run) -> None:
    found = json.loads(run(EIGHT, "--gpu", "h100", "--json").output)
    assert found.keys() == {
        "plan", "gpu", "model", "memory", "would_fit", "time", "checkpoint", "queue", "missing", "notes",
    }  # fmt: skip
    assert sum(found["memory"]["bytes"].values()) == found["memory"]["total"]
    assert found["memory"]["bytes"].keys() <= memory.CAUSES.keys()
    assert found["would_fit"][0].keys() == {"changes", "total", "slower", "nodes"}


def test_a_model_of_ones_own_is_said_and_the_rest_is_shown(run: Run) -> None:
    shown = run("model: {_target_: 'a.b:C'}\n", "--tokens-per-second", "1e4")
    assert shown.return_value == 1 and "custom models" in shown.output and "run time" in shown.output
    shown = run("model: {_target_: 'a.b:C'}\n")
    assert shown.return_value == 1 and "the throughput is unknown" in shown.output


def test_no_pace_of_a_cpu_but_memory_and_checkpoints(run: Run) -> None:
    shown = run("model: {size: 1M}\n")
    assert shown.return_value == 0 and "fits: " in shown.output and "checkpoint" in shown.output
    assert "the throughput is unknown" in shown.output
    shown = run("model: {size: 125M}\nslurm: {mem: 2G, nodes: 2}\nstep_scheduler: {local_batch_size: 64}\n")
    assert shown.return_value == 1 and "does not fit" in shown.output and "of 2.0 GiB" in shown.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "h300"], "unknown GPU model"),
        ([], "the GPU model is unknown"),
        (
            ["--gpu", "h100", "--set", "distributed.tp_size=8", "--gpus-per-node", "4", "--nodes", "1"],
            "fewer than the 8",
        ),
        (["--gpu", "h100", "--tokens-per-second", "-3"], "must be a number above 0"),
        (["--gpu", "h100", "--mfu", "nan"], "must be a number above 0"),
        (["--gpu", "h100", "--mfu", "5"], "--mfu 5.0: must be a fraction"),
        (["--gpu", "h100", "--nodes", "0"], "at least 1"),
    ],
)
def test_wrong_usage(run: Run, options: list[str], words: str) -> None:
    error = run(EIGHT, *options).exception
    assert isinstance(error, RaylaunchError) and error.exit_code == 2 and words in error.message


def test_faults_that_leave_no_time_are_said(run: Run) -> None:
    shown = run(EIGHT, "--gpu", "h100", "--failures", "1000")
    assert "failures take all of the time" in shown.output.replace("\n", " ")
    assert json.loads(run(EIGHT, "--gpu", "h100", "--failures", "1000", "--json").output)["time"]["end"] is None


def test_notes(run: Run) -> None:
    masked = run(EIGHT, "--gpu", "h100", "--set", "data.document_mask=true").output
    assert "GiB more for attention scores" in masked.replace("\n", " ")
    experts = run(EIGHT.replace("8B", "125M, n_experts: 8"), "--gpu", "h100").output
    assert "32 shards of 8 experts" in experts.replace("\n", " ")
    made = config(slurm={"nodes": "5"}, model=LLAMA, distributed={"tp_size": 8, "pp_size": 2})
    found = estimate.estimate(made, Given(H100, 5, 8, H100.memory))
    assert any("1 of 5 nodes are spare:" in note for note in found.notes)
    assert math.isfinite(found.end or math.inf)


def test_conversations_are_masked(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "sft"}')
    assert estimate.is_masked(config(data={"prepared": str(tmp_path)}))
    (tmp_path / "manifest.json").write_text("{")
    assert not estimate.is_masked(config(data={"prepared": str(tmp_path)}))
