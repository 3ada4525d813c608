"""The batch script: golden files, `bash -n`, and what is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from raylaunch.config.schema import Config, ElasticConfig, JoinConfig, SlurmConfig
from raylaunch.errors import UsageError
from raylaunch.scheduler.slurm import batch_script

GOLDEN = Path(__file__).parent / "data" / "scripts"

BASES = {
    "plain": SlurmConfig(nodes="4"),
    "gpu": SlurmConfig(
        nodes="2:8", gpus_per_node="a100:4", cpus_per_task=16, mem="400G", time="2-00:00:00", account="proj",
        partition="gpu", qos="high", exclusive=True, comment="the big one", modules=["cuda/12.4"],
        setup=["source /opt/site.sh", "export NCCL_IB_HCA=mlx5"], env={"WANDB_API_KEY": "${WANDB_API_KEY}", "A": "it's 1"},
        extra=["--dependency", "singleton", "--switches=1"],
    ),
}  # fmt: skip


JOINERS = {
    "joiner": (Config(slurm=BASES["plain"]), 1, ()),
    "joiner-gpu": (
        Config(slurm=BASES["gpu"].model_copy(update={"exclude": "bad[1-2]"}),
               elastic=ElasticConfig(join=JoinConfig(partition="spot", qos="low", time="4:00:00"))),
        4, ("node1", "node2", "node7")),
}  # fmt: skip
DOCTOR = "doctor-gpu"
CASES = [*BASES, *JOINERS, DOCTOR]


def rendered(name: str) -> str:
    where, python = Path("/shared/state/clusters/main"), "/opt/venv/bin/python"
    if name in JOINERS:
        config, nodes, exclude = JOINERS[name]
        return batch_script.render_joiner(config, "main", where, "0123abcd", nodes, exclude, python)
    if name == DOCTOR:
        return batch_script.render_doctor(BASES["gpu"], Path("/shared/state/doctor/0123"), "0123abcd", python)
    return batch_script.render(BASES[name], "main", where, "0123abcd", python, requeue=name == "plain")


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    """A change of the script shows as a diff; write the new file when it is meant."""
    assert rendered(name) == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("name", CASES)
def test_is_bash_and_survives_a_dead_node(name: str) -> None:
    text = rendered(name)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "#SBATCH --no-kill\n" in text
    assert ("#SBATCH --signal=B:USR1@120\n" in text) is (name != DOCTOR)
    assert "srun --export=ALL --no-kill --kill-on-bad-exit=0 --wait=0" in text


def test_requeued_unless_told_otherwise() -> None:
    def flags(requeue: bool, *extra: str) -> set[str]:
        lines = batch_script.options(SlurmConfig(extra=list(extra)), "m", Path("/s"), "c", requeue)
        return {line for line in lines if "requeue" in line}

    assert flags(True) == {"--requeue"} and flags(False) == {"--no-requeue"}
    assert flags(True, "--no-requeue") == {"--no-requeue"} and flags(False, "--requeue") == {"--requeue"}


def test_a_joiner_leaves_out_what_is_the_bases_alone() -> None:
    extra = [
        "--dependency",
        "singleton",
        "--switches=1",
        "-d",
        "after:3",
        "-H",
        "--begin=now+1hour",
        "--nice",
        "5",
        "--requeue",
    ]
    slurm = SlurmConfig(
        extra=extra, nodelist="node[1-4]", mail_user="me", mail_type="END", job_name="mine", comment="it's mine"
    )
    lines = batch_script.joiner_options(Config(slurm=slurm), "m", Path("/s"), "c", 3, [])
    assert lines[-4:] == ["--no-kill", "--no-requeue", "--switches=1", "--nice 5"]
    assert not any(line.startswith(("--nodelist", "--mail", "--exclude")) for line in lines)
    assert "--job-name=raylaunch-m-join" in lines and "--nodes=1-3" in lines
    assert '--comment="raylaunch cluster=m life=c nodes=3; it\'s mine"' in lines


def test_excluded(tmp_path: Path) -> None:
    assert batch_script.excluded(SlurmConfig(), []) is None
    assert batch_script.excluded(SlurmConfig(exclude="a[1-2]"), ["b2", "b1"]) == "a[1-2],b[1-2]"
    listed = tmp_path / "bad"
    listed.write_text("x1\nx2\n")
    assert batch_script.excluded(SlurmConfig(exclude=str(listed)), ["b"]) == "x1,x2,b"
    assert batch_script.excluded(SlurmConfig(exclude=str(listed)), []) == str(listed)
    assert batch_script.barred(SlurmConfig(exclude=str(listed))) == {"x1", "x2"}
    assert (
        batch_script.barred(SlurmConfig(exclude="a[1-2]")) == {"a1", "a2"}
        and batch_script.barred(SlurmConfig()) == frozenset()
    )


def test_secrets_stay_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    assert "hunter2" not in rendered("gpu")
    assert 'export WANDB_API_KEY="${WANDB_API_KEY}"' in rendered("gpu")


def test_env_values_reach_the_shell_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"A": 'it\'s $HOME `x` "q"', "B": "pre ${TOKEN} post", "C": ""}
    lines = [
        line
        for line in batch_script.render(SlurmConfig(env=values), "m", Path("/s"), "c").splitlines()
        if line.startswith("export ")
    ]
    shown = subprocess.run(
        ["bash", "-c", "\n".join(lines) + '\nprintf "%s|%s|%s" "$A" "$B" "$C"'],
        env={"TOKEN": "s e"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout == 'it\'s $HOME `x` "q"|pre s e post|'


@pytest.mark.parametrize(
    ("option", "named"),
    [("--array=1-4", "--array"), ("-a1-4", "--array"), ("--output=x", "--output"), ("-o", "--output"),
     ("--no-kill", "--no-kill"), ("--wrap=true", "--wrap"), ("-N4", "--nodes"), ("--nodes=4", "--nodes"),
     ("--signal=B:TERM@9", "--signal")],
)  # fmt: skip
def test_options_that_raylaunch_owns_are_refused_by_name(option: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        batch_script.check_extra([option])


def test_other_options_pass_through() -> None:
    batch_script.check_extra(["--dependency", "afterok:12", "--switches=2@10", "--nice=5", "--hold"])


@pytest.mark.parametrize(
    ("given", "workers"),
    [({}, 1), ({"gpus_per_node": 4}, 4), ({"gpus_per_node": "a100:2"}, 2), ({"gres": "gpu:h100:8"}, 8),
     ({"gres": "shard:3,gpu:2"}, 2), ({"gres": "gpu"}, 1), ({"gpus_per_node": 4, "ntasks_per_node": 2}, 2),
     ({"gpus_per_node": 0}, 1)],
)  # fmt: skip
def test_workers_per_node(given: dict[str, object], workers: int) -> None:
    assert batch_script.workers_per_node(SlurmConfig(**given)) == workers  # type: ignore[arg-type]
