"""sbatch scripts and commands as people have them → configs; all that is not carried over is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from raylaunch.cli.convert import convert as command
from raylaunch.config import loader
from raylaunch.config.convert import flags, from_script, shell

TUTORIAL = """#!/bin/bash
#SBATCH --job-name=llama-ft
#SBATCH -N 4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96      # all of them
#SBATCH -A proj42
#SBATCH --time=24:00:00 --exclusive
#SBATCH --output=logs/%x-%j.out
#SBATCH --nice=100
##SBATCH --qos=debug

set -euo pipefail
module purge
module load cuda/12.4 nccl/2.20
source ~/venv/bin/activate
export NCCL_DEBUG=INFO
export HF_HOME=/scratch/$USER/hf
export WANDB_API_KEY=abcdef0123456789
nodes=( $( scontrol show hostnames $SLURM_JOB_NODELIST ) )
head_node_ip=$(srun --nodes=1 --ntasks=1 -w "$head_node" hostname --ip-address)
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=29500
LR=3e-4
OUT=/scratch/run1
echo Node IP: $head_node_ip
#SBATCH --partition=ignored-by-sbatch-too

srun torchrun \\
  --nnodes 4 \\
  --nproc_per_node 8 \\
  --rdzv_id $RANDOM \\
  --rdzv_backend c10d \\
  --rdzv_endpoint $head_node_ip:29500 \\
  train.py --lr $LR --out "$OUT" --note 'two words' 2>&1 | tee log.txt
"""


def test_the_tutorials_script() -> None:
    found = from_script.script(TUTORIAL)
    assert found.values == {
        "slurm": {
            "job_name": "llama-ft", "nodes": "4", "gpus_per_node": "8", "cpus_per_task": 12, "account": "proj42",
            "time": "24:00:00", "exclusive": True, "extra": ["--nice=100"], "ntasks_per_node": 8,
            "setup": [
                "module purge", "module load cuda/12.4 nccl/2.20", "source ~/venv/bin/activate",
                "export HF_HOME=/scratch/$USER/hf",
            ],
            "env": {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "${WANDB_API_KEY}"},
        },
        "trainer": {
            "script": "train.py", "args": ["--lr", "3e-4", "--out", "/scratch/run1", "--note", "two words"],
        },
    }  # fmt: skip
    assert [note.split(":")[0] for note in found.notes] == ["--output=logs/%x-%j.out", "WANDB_API_KEY"]
    assert "abcdef" not in str(found)


def test_one_task_a_gpu_behind_srun() -> None:
    found = from_script.script(
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=4 --gres=gpu:a100:4 -c 16 -t 2-00:00:00 -p booster\n"
        "#SBATCH --container-image=nvcr.io/nvidia/pytorch:24.05-py3\nml Stages/2024 CUDA\nexport OMP_NUM_THREADS=4\n"
        'cd $HOME/project\nsrun --cpu-bind=none bash -c "source env.sh && python -u main.py model=gpt"\ncd /results\n'
    )
    assert found.values == {
        "slurm": {
            "nodes": "2", "ntasks_per_node": 4, "gres": "gpu:a100:4", "cpus_per_task": 16, "time": "2-00:00:00",
            "partition": "booster", "setup": ["ml Stages/2024 CUDA", "source env.sh"],
        },
        "trainer": {"script": "main.py", "args": ["model=gpt"], "chdir": "${HOME}/project"},
    }  # fmt: skip
    said = " ".join(found.notes)
    assert "--container-image" in said and "--cpu-bind=none" in said and "take its rank from RANK" in said


def test_totals_arrays_containers_and_modules_of_python() -> None:
    found = from_script.script(
        "#!/bin/bash -l\n#SBATCH -J x -n 16 --gpus=a100:16 -N4 --array=0-3\nconda activate torch\n"
        "NCCL_IB_HCA=mlx5 srun --export=ALL apptainer exec --nv image.sif python -m torch.distributed.run "
        "--nproc-per-node=gpu --nnodes=$SLURM_NNODES -m pkg.train --cfg $CFG &\nwait\npython evaluate.py\n"
    )
    assert found.values == {
        "slurm": {
            "job_name": "x", "nodes": "4", "setup": ["conda activate torch"], "env": {"NCCL_IB_HCA": "mlx5"},
            "gpus_per_node": "a100:4", "ntasks_per_node": 4,
        },
        "trainer": {"script": "pkg/train.py", "args": ["--cfg", "${CFG}"]},
    }  # fmt: skip
    said = " ".join(found.notes)
    for word in ("--array", "apptainer", "runpy", "$CFG", "not carried over: python evaluate.py"):
        assert word in said, word


def converted(body: str, directives: str = "") -> tuple[dict[str, Any], dict[str, Any], str]:
    found = from_script.script(f"#!/bin/bash\n{directives}\n{body}\n")
    return found.values.get("slurm", {}), found.values["trainer"], " ".join(found.notes)


def test_preparation_stays_as_it_stands_and_in_its_order() -> None:
    slurm, _, _ = converted(
        "module load a && module load b  # both\nRUN=run_$(date +%Y%m%d)\nUNUSED=$(hostname)\n"
        "export PATH=/opt/bin:$PATH\nexport OUT=/scratch/$RUN A=1\ncd /x && source venv/bin/activate\ntorchrun t.py"
    )
    assert slurm["setup"] == [
        'RUN="run_$(date +%Y%m%d)"', "module load a", "module load b", "export PATH=/opt/bin:$PATH",
        "export OUT=/scratch/$RUN", "source venv/bin/activate",
    ]  # fmt: skip
    assert slurm["env"] == {"A": "1"}


def test_the_training_is_found_among_other_commands() -> None:
    slurm, trainer, notes = converted(
        "srun -N 1 -n 1 tar xf data.tar\npython -m pip install -r requirements.txt\nOUT=$(srun python get.py)\n"
        "python prepare.py\nif true; then\n  srun torchrun --rdzv_endpoint $(scontrol show hostnames | head -n 1):29500 "
        "train.py --lr 0.1  # the usual\nfi\n",
        "#SBATCH -N 4 --ntasks-per-node=2 --gpus-per-task=1",
    )
    assert trainer == {"script": "train.py", "args": ["--lr", "0.1"]} and slurm["nodes"] == "4"
    assert slurm["gpus_per_node"] == 1 and "ntasks_per_node" not in slurm
    assert "prepare.py" in notes and "tar xf" in notes and "inside an if" in notes
    slurm, _, notes = converted("srun --ntasks-per-node=$TASKS torchrun train.py")
    assert slurm == {} and "--ntasks-per-node=$TASKS" in notes


def test_what_only_the_shell_knows_is_told_and_left_out() -> None:
    _, trainer, notes = converted(
        "if x; then\nMODE=a\nelse\nMODE=b\nfi\n"
        'torchrun train.py "$@" "${SEED:-1}" "${ARGS[@]}" ~/data --t $(date +%s) --mode $MODE --home $HOME/x'
    )
    assert trainer["args"] == ["1", "${HOME}/data", "--t", "--mode", "${MODE}", "--home", "${HOME}/x"]
    for word in ("$@", "${ARGS[@]}", "$(date +%s)", "MODE is set inside", "$MODE in the training"):
        assert word in notes, word


def test_signals_come_over() -> None:
    slurm, trainer, _ = converted("srun torchrun t.py", "#SBATCH --signal=SIGUSR1@90")
    assert slurm["signal"] == "B:USR1@90" and trainer["stop_signal"] == "SIGUSR1" and trainer["stop_timeout"] == 90.0
    slurm, trainer, notes = converted("srun torchrun t.py", "#SBATCH --signal=B:USR1@300")
    assert slurm["signal"] == "B:USR1@300" and "stop_signal" not in trainer and "stop_signal" in notes


def test_secrets_stay_where_they_are() -> None:
    found = from_script.script(
        "export HF_TOKEN=hf_x1 HF_HOME=/y\nKEY=abc9\nwandb login abc123\nfoo --api-key zzz9\n"
        "torchrun t.py --wandb-key $KEY --token hf_x1\n"
    )
    text = str(found)
    assert all(secret not in text for secret in ("hf_x1", "abc9", "abc123", "zzz9"))
    assert found.values["slurm"]["env"] == {"HF_TOKEN": "${HF_TOKEN}", "HF_HOME": "/y"}
    assert found.values["trainer"]["args"] == ["--wandb-key", "${KEY}", "--token", "${HF_TOKEN}"]


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("torchrun --nnodes 2:4 --nproc-per-node 8 train.py --lr 0.1",
         {"slurm": {"nodes": "2:4", "ntasks_per_node": 8}, "trainer": {"script": "train.py", "args": ["--lr", "0.1"]}}),
        ("python3 -m torch.distributed.launch --use-env a.py", {"trainer": {"script": "a.py"}}),
        ("torchrun --standalone --nproc-per-node=gpu -- a.py -x", {"trainer": {"script": "a.py", "args": ["-x"]}}),
        ("srun -N2 --gpus-per-node=4 --ntasks-per-node=4 python a.py",
         {"slurm": {"nodes": "2", "gpus_per_node": "4", "ntasks_per_node": 4}, "trainer": {"script": "a.py"}}),
        ("env A=b accelerate launch --multi_gpu --num_processes 8 a.py --b",
         {"slurm": {"env": {"A": "b"}}, "trainer": {"script": "a.py", "args": ["--b"]}}),
    ],
)  # fmt: skip
def test_commands(words: str, values: dict[str, Any]) -> None:
    assert from_script.command(words.split()).values == values


def test_options_of_slurm_are_read_as_slurm_reads_them() -> None:
    given = flags.slurm(["-N2", "-p", "a", "--exclusive", "--mem=4G", "--time", "5", "-c=3", "run.sh", "-x"])
    assert given.values == {
        "nodes": "2",
        "partition": "a",
        "exclusive": "",
        "mem": "4G",
        "time": "5",
        "cpus-per-task": "3",
    }
    assert given.rest == ["run.sh", "-x"]


def test_heredocs_comments_and_redirections_are_no_commands() -> None:
    read = shell.read(
        "cat <<EOF > f\ntorchrun a.py\nEOF\n# torchrun b.py\nA='x y'  # why\necho \"$A\" 2>/dev/null && b\n"
    )
    assert [c.text for c in read.commands] == ["cat <<EOF > f", "A='x y'", 'echo "$A" 2>/dev/null', "b"]
    assert shell.words("python a.py > log 2>&1 < in | tee x") == ["python", "a.py"]
    assert shell.words("a 'b c'\"d $(e f)\" --x=$(g | h) y\\ z") == ["a", "b cd $(e f)", "--x=$(g | h)", "y z"]
    inside = shell.read("for i in 1 2; do\n  a\ndone\nb\n").commands
    assert [(c.text, c.inside) for c in inside] == [("a", True), ("b", False)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no training command"), ("echo hi\n", "no training command"), ('srun "python a.py\n', "line 1"),
        ("srun hostname\n", "no training command"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_says_why(text: str, words: str) -> None:
    with pytest.raises(from_script.Unreadable, match=words):
        from_script.script(text)


PIECES = [
    *"ab \n\"'\\$(){}=<>|&;#-/.~`0123",
    "srun ",
    "torchrun ",
    "#SBATCH -N",
    "export A=",
    "export KEY=",
    "python ",
    "cd ",
    "--ntasks-per-node=",
    "--nproc-per-node=$X ",
    "$(a b) ",
    "${X:-1} ",
    "<<EOF ",
    "\nEOF\n",
    "if ",
    "fi\n",
    "-m ",
    "a.py ",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join))
def test_whatever_the_text_it_is_converted_or_refused(text: str) -> None:
    try:
        found = from_script.script(text)
    except from_script.Unreadable:
        return
    assert found.values["trainer"]["script"] and all("\n" not in note for note in found.notes)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, out = tmp_path / "train.sbatch", tmp_path / "train.yaml"
    script.write_text(TUTORIAL)
    done = CliRunner().invoke(command, [str(script), "-o", str(out)])
    assert done.exit_code == 0 and "raylaunch train" in done.stderr and not done.stdout
    monkeypatch.setenv("WANDB_API_KEY", "x")
    config = loader.load(out, user_file=None)
    assert config.trainer.script == "train.py" and config.slurm.ntasks_per_node == 8 and config.slurm.max_nodes == 4
    shown = CliRunner().invoke(command, ["--", "torchrun", "a.py", "--lr", "1"])
    assert yaml.safe_load(shown.stdout) == {"trainer": {"script": "a.py", "args": ["--lr", "1"]}}
    neither = CliRunner().invoke(command, ["--", "ls"]).exception
    assert str(neither).startswith("ls: not a script file, and not a torchrun, srun or python command\n")
