"""Bad input that no scheduler is needed to refuse: a clear error that names the setting and the next step, exit code 2
for usage and 1 for failure, never a traceback, and nothing written. What Slurm itself refuses: tests/slurm/test_bad_input.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from raylaunch.cli import main

FILES = {
    "good.yaml": "slurm: {nodes: 1}\n",
    "torn.yaml": "slurm:\n  nodes: [1, 2\n",
    "tab.yaml": "slurm:\n\tnodes: 1\n",
    "list.yaml": "- slurm\n- model\n",
    "typo.yaml": "slurm:\n  time: 10\n  partitoin: main\n",
    "section.yaml": "slrum:\n  nodes: 1\n",
    "elsewhere.yaml": "model:\n  max_steps: 3\n",
    "type.yaml": "slurm:\n  exclusive: yes please\n",
    "value.yaml": "model: {dim: 64, n_heads: 5}\n",
    "twice.yaml": "slurm:\n  nodes: 1\n  nodes: 2\n",
    "unset.yaml": "slurm:\n  account: ${NO_SUCH_VARIABLE}\n",
    "binary.yaml": "\x00\x01\x02",
    "owned.yaml": "slurm:\n  extra: ['--array=1-3']\n",
    "many.yaml": "slurm: {nodes: 0, tiem: 3}\nmodel: {size: huge}\n",
}

Shell = Callable[..., Result]


class _EntryPoint:
    """`raylaunch.cli.main` as CliRunner wants a command: the whole entry point, with its own printing of errors."""

    name = "raylaunch"

    def main(self, args: Sequence[str] = (), prog_name: str = "raylaunch", **_: object) -> None:
        before, sys.argv = sys.argv, [prog_name, *args]
        try:
            main()
        finally:
            sys.argv = before


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with the files above."""
    made = tmp_path / "home"
    made.mkdir()
    for name, text in FILES.items():
        (made / name).write_text(text)
    return made


@pytest.fixture
def shell(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """`shell("up", …)`: the entry point of the command line, of a user with an empty home and no Slurm."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH", "RAYLAUNCH"))]:
        monkeypatch.delenv(name)
    for name, value in {"HOME": home, "XDG_CONFIG_HOME": home, "RAYLAUNCH_STATE_DIR": tmp_path / "state"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PATH", "/nowhere")

    def shell(*words: object) -> Result:
        return CliRunner().invoke(_EntryPoint(), [str(word) for word in words])  # type: ignore[arg-type]

    return shell


def check(done: Result, code: int, words: Sequence[str], nothing_on_stdout: bool) -> None:
    """Exit code and words (`a|b`: one of them), and neither a traceback nor the names of our classes."""
    assert done.exit_code == code, (done.output, done.exception)
    for word in words:
        assert any(option in done.output for option in word.split("|")), (word, done.output)
    assert isinstance(done.exception, SystemExit | None)  # anything else would be a traceback
    assert "Traceback" not in done.output and "raylaunch.errors" not in done.output
    assert not nothing_on_stdout or done.stdout == ""


def nothing_in(state_dir: Path) -> bool:
    """No cluster and no run, not even half made."""
    return not list(state_dir.glob("*/[!.]*"))


# Arguments ({home}: where the files above lie), exit code, words that must be said.
UP = [
    # The configuration.
    ("-c {home}/torn.yaml", 2, ["torn.yaml:", "not valid YAML", "bracket"]),
    ("-c {home}/tab.yaml", 2, ["tab.yaml:2", "spaces, not tabs"]),
    ("-c {home}/list.yaml", 2, ["list.yaml:1", "mapping of sections"]),
    ("-c {home}/typo.yaml", 2, ["typo.yaml:3", "slurm.partitoin", "unknown key", "did you mean partition"]),
    ("-c {home}/section.yaml", 2, ["section.yaml:1", "did you mean slurm"]),
    ("-c {home}/elsewhere.yaml", 2, ["elsewhere.yaml:2", "step_scheduler.max_steps"]),
    ("-c {home}/type.yaml", 2, ["type.yaml:2", "slurm.exclusive", "true or false", "yes please"]),
    ("-c {home}/value.yaml", 2, ["value.yaml:1", "dim (64) must be a multiple of n_heads (5)"]),
    ("-c {home}/twice.yaml", 2, ["twice.yaml:3", "twice"]),
    ("-c {home}/unset.yaml", 2, ["unset.yaml:2", "NO_SUCH_VARIABLE is not set"]),
    ("-c {home}/binary.yaml", 2, ["binary.yaml"]),
    ("-c {home}/many.yaml", 2, ["3 errors", "slurm.nodes", "slurm.tiem", "model.size"]),
    ("-c {home}/absent.yaml", 2, ["absent.yaml: no such file"]),
    ("-c {home}/god.yaml", 2, ["god.yaml: no such file", "Did you mean", "good.yaml"]),
    ("-c {home}", 2, ["is a directory", "YAML file"]),
    # Sizes and options.
    ("--nodes 0", 2, ["slurm.nodes", "at least 1"]),
    ("--nodes 4:2", 2, ["4:2", "the minimum exceeds the maximum"]),
    ("--nodes many", 2, ["slurm.nodes", "a number (4) or a range (2:8)"]),
    ("--cpus-per-task 0", 2, ["slurm.cpus_per_task", "1"]),
    ("--time soon", 2, ["slurm.time", "minutes"]),
    ("--name a/b", 2, ["cluster.name", "letters, digits"]),
    ("--backend pbs", 2, ["--backend", "slurm", "local"]),
    ("--set slurm.nodes", 2, ["--set slurm.nodes", "key=value", "slurm.nodes=4"]),
    ("--set slurm.node=4", 2, ["--set slurm.node=4", "did you mean nodes"]),
    ("--set slurm.nodes=0", 2, ["--set slurm.nodes=0", "at least 1"]),
    ("--set slurm.signal=soon", 2, ["slurm.signal", "B:USR1@120"]),
    # What raylaunch must own.
    ("-- --output here", 2, ["--output", "raylaunch's own", "Leave it out"]),
    ("-- -o here", 2, ["--output", "raylaunch's own"]),
    ("-- --array=1-3", 2, ["--array", "a cluster is one job"]),
    ("-- --no-kill", 2, ["--no-kill", "raylaunch's own"]),
    ("-- -N3", 2, ["--nodes", "slurm.nodes"]),
    ("-- --signal=B:TERM@10", 2, ["--signal", "slurm.signal"]),
    ("-c {home}/owned.yaml", 2, ["--array", "raylaunch's own", "slurm.extra"]),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code", "words"), UP, ids=[row[0].replace("{home}/", "") for row in UP])
def test_up(shell: Shell, home: Path, tmp_path: Path, line: str, code: int, words: Sequence[str]) -> None:
    done = shell("up", *line.format(home=home).split())
    check(done, code, words, nothing_on_stdout=True)
    assert done.stderr.startswith(("error: ", "Usage: ", "["))
    assert nothing_in(tmp_path / "state")


COMMANDS = [
    ("trian x.yaml", 2, ["trian"]),
    ("up --nonsense", 2, ["--nonsense"]),
    ("up main", 2, ["main", "--name"]),
    ("train", 2, ["CFG"]),
    ("train {home}/good.yaml", 2, ["no cluster main", "raylaunch up"]),
    ("train {home}/good.yaml --cluster nope", 2, ["no cluster nope", "raylaunch up"]),
    ("train {home}/typo.yaml", 2, ["typo.yaml:3", "did you mean partition"]),
    ("train {home}/absent.yaml", 2, ["absent.yaml: no such file"]),
    ("train {home}/good.yaml --set model.size=2B", 2, ["--set model.size=2B", "1B"]),
    ("submit {home}/good.yaml --run a/b", 2, ["--run a/b", "letters, digits"]),
    ("submit {home}/good.yaml --nodes 0", 2, ["at least 1"]),
    ("submit {home}/good.yaml -- --wrap=true", 2, ["--wrap", "raylaunch's own"]),
    ("script --nodes 0", 2, ["at least 1"]),
    ("script -- --output=x", 2, ["--output"]),
    ("attach nope", 2, ["no run nope", "raylaunch train"]),
    ("stop nope", 2, ["no run nope", "raylaunch train"]),
    ("logs nope", 2, ["nope", "raylaunch status"]),
    ("logs", 2, ["no run", "raylaunch train"]),
    ("down nope", 2, ["no cluster nope", "raylaunch up"]),
    ("dashboard nope", 2, ["no cluster nope", "raylaunch up"]),
    ("dashboard", 2, ["0 clusters are running", "raylaunch up"]),
    ("status", 0, ["no cluster is up", "raylaunch up"]),
    ("down", 0, ["no cluster|nothing"]),
]


@pytest.mark.parametrize(("line", "code", "words"), COMMANDS, ids=[row[0].replace("{home}/", "") for row in COMMANDS])
def test_other_commands(shell: Shell, home: Path, tmp_path: Path, line: str, code: int, words: Sequence[str]) -> None:
    check(shell(*line.format(home=home).split()), code, words, nothing_on_stdout=code != 0)
    assert nothing_in(tmp_path / "state")


def test_no_slurm(shell: Shell, home: Path, tmp_path: Path) -> None:
    for command in (["up"], ["submit", home / "good.yaml"]):
        words = ["`sbatch` cannot be run", "login node", "cluster.backend"]
        check(shell(*command, "--backend", "slurm"), 1, words, nothing_on_stdout=True)
        assert nothing_in(tmp_path / "state")


def test_a_state_directory_that_is_a_file(shell: Shell, home: Path) -> None:
    path = home / "good.yaml"
    words = [str(path), "Not a directory", "--state-dir"]
    check(shell("up", "--backend", "slurm", "--state-dir", path), 1, words, nothing_on_stdout=True)
    assert path.read_text() == FILES["good.yaml"]
