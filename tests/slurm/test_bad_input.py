"""Bad input, one table: a clear error that names the thing and the next step, the right exit code (2 for
usage, 1 for failure), never a traceback, and nothing left behind. Against a real Slurm that is idle."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from helpers import BIN, NOBODY, Site, mounted, own_sandbox, python_for_all, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]

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


@pytest.fixture(scope="module")
def common_python() -> Iterator[Path]:
    with python_for_all() as made:
        yield made


@pytest.fixture(scope="module")
def site(common_python: Path) -> Iterator[Site]:  # its mounts come before the nodes
    with own_sandbox("input", nodes=4, cpus=4) as machine:
        made = Site.make(machine, "alice")
        for name, text in FILES.items():
            (made.state / "home" / name).write_text(text)
        made.common_python = common_python
        yield made
        try:
            made.wait_clean()
        finally:
            made.end()


@pytest.fixture
def empty(site: Site, request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """A state directory that does not exist yet, as an environment; no job and nothing in it afterwards."""
    path = site.state / f"empty-{abs(hash(request.node.name))}"
    yield {"RAYLAUNCH_STATE_DIR": str(path)}
    wait_for("no job", lambda: not site.jobs(), 30, lambda: str(site.jobs()))
    assert not list(path.glob("*/*")), "a cluster or run is half made"


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
    ("--nodes 4:2", 2, ["4:2", "upside down"]),
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
    # What Slurm refuses, in its own words.
    ("--nodes 9", 1, ["slurm.nodes"]),
    ("--partition nope", 1, ["sbatch", "invalid partition specified: nope", "main (default), low, lowc, small, down"]),
    ("--partition down", 1, ["the partition is down", "slurm.partition"]),
    ("--nodes 2 --partition small", 1, ["small|partition", "slurm.nodes"]),
    ("--time 2-00:00:00", 1, ["slurm.time|time"]),
    ("--mem 99T", 1, ["Memory specification can not be satisfied", "24|MiB"]),
    ("--cpus-per-task 64", 1, ["CPUs|cpus_per_task"]),
    ("--gpus-per-node 8", 1, ["generic resource (gres)", "slurm.gpus_per_node"]),
    ("--set slurm.constraint=big", 1, ["Invalid feature specification", "slurm.constraint"]),
    ("--set slurm.nodelist=nowhere", 1, ["nowhere|Invalid node name", "slurm.nodelist"]),
    ("--set slurm.reservation=none", 1, ["reservation is invalid", "slurm.reservation"]),
    ("-- --nonsense", 1, ["unrecognized option", "--nonsense", "slurm.extra"]),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code", "words"), UP, ids=[row[0].replace("{home}/", "") for row in UP])
def test_up(site: Site, empty: dict[str, str], line: str, code: int, words: Sequence[str]) -> None:
    began = time.monotonic()
    done = site.run("up", *line.format(home=site.state / "home").split(), env=empty).expect(code)
    assert time.monotonic() - began < 20
    assert done.out == ""
    for word in words:
        assert any(option in done.err for option in word.split("|")), (word, str(done))
    assert done.err.startswith(("error: ", "Usage: ", "[")) and "raylaunch.errors" not in done.err


COMMANDS = [
    ("trian x.yaml", 2, ["trian"]),
    ("up --nonsense", 2, ["--nonsense"]),
    ("up main", 2, ["main", "--name"]),
    ("train", 2, ["PATH"]),
    ("train {home}/good.yaml", 2, ["no cluster main", "raylaunch up"]),
    ("train {home}/good.yaml --cluster nope", 2, ["no cluster nope", "raylaunch up"]),
    ("train {home}/typo.yaml", 2, ["typo.yaml:3", "did you mean partition"]),
    ("train {home}/absent.yaml", 2, ["absent.yaml: no such file"]),
    ("train {home}/good.yaml --set model.size=2B", 2, ["--set model.size=2B", "1B"]),
    ("submit {home}/good.yaml --run a/b", 2, ["--run a/b", "letters, digits"]),
    ("submit {home}/good.yaml --partition nope", 1, ["invalid partition specified: nope"]),
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
    ("dashboard", 2, ["0 clusters are up", "raylaunch up"]),
    ("status", 0, ["no cluster is up", "raylaunch up"]),
    ("down", 0, ["no cluster|nothing"]),
]


@pytest.mark.parametrize(("line", "code", "words"), COMMANDS, ids=[row[0] for row in COMMANDS])
def test_other_commands(site: Site, empty: dict[str, str], line: str, code: int, words: Sequence[str]) -> None:
    args = line.format(home=site.state / "home").split()
    done = site.run(*args, env=empty).expect(code)
    for word in words:
        assert any(option in done.all for option in word.split("|")), (word, str(done))
    assert code == 0 or done.out == ""


# --- the state directory --------------------------------------------------------------------------------


def test_a_full_state_directory(site: Site) -> None:
    with mounted(site.state / "full", "16k") as path:
        with (path / "filling").open("wb", buffering=0) as out, pytest.raises(OSError, match="No space left"):
            while True:
                out.write(bytes(1024))
        done = site.run("up", "--state-dir", path)
        done.expect(1, str(path), "No space left on device", "free some space", "cluster.state_dir")
        done = site.run("submit", site.state / "home" / "good.yaml", "--state-dir", path)
        done.expect(1, str(path), "No space left on device")
        assert done.out == "" and not site.jobs()
        assert not list(path.glob("*/*/[!.]*")), "what could be written is removed again"


def test_a_read_only_state_directory(site: Site) -> None:
    with mounted(site.state / "fixed", "1M") as path:
        subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
        site.run("up", "--state-dir", path).expect(1, str(path), "Read-only file system", "--state-dir")
        site.run("submit", site.state / "home" / "good.yaml", "--state-dir", path).expect(1, "Read-only")
        site.run("status", "--state-dir", path).expect(0, "no cluster is up")


def test_a_state_directory_that_is_a_file(site: Site) -> None:
    path = site.state / "home" / "good.yaml"
    site.run("up", "--state-dir", path).expect(1, str(path), "Not a directory", "--state-dir")


def test_a_state_directory_and_a_file_that_are_not_ours(site: Site) -> None:
    bob = Site.make(site.sandbox, "bob", NOBODY, site.common_python)
    closed = site.state / "closed"
    closed.mkdir(mode=0o700)
    secret = site.state / "home" / "closed.yaml"
    secret.write_text(FILES["good.yaml"])
    secret.chmod(0o600)
    bob.run("up", env={"RAYLAUNCH_STATE_DIR": str(closed)}).expect(1, str(closed), "Permission denied")
    bob.run("up", "--state-dir", closed).expect(2, "--state-dir", str(closed))
    bob.run("up", "-c", secret).expect(2, "closed.yaml", "is not readable")
    bob.run("status").expect(0, "no cluster is up")
    bob.wait_clean()


def test_a_state_directory_that_no_node_has(site: Site, tmp_path: Path) -> None:
    """/tmp is every node's own. The login node's is not theirs."""
    assert tmp_path.is_relative_to("/tmp")
    began = time.monotonic()
    done = site.run("up", "--nodes", 2, "--state-dir", tmp_path)
    assert time.monotonic() - began < 45
    done.expect(1, str(tmp_path), "do not see the state directory", "cluster.state_dir")


def test_a_state_directory_that_one_node_does_not_share(site: Site) -> None:
    """The canary finds it: the node sees a directory of that name, but another one."""
    site.inside("node3", "mount", "-t", "tmpfs", "raylaunch-test", str(site.state))
    try:
        done = site.run("up", "--nodes", 2, "--set", "slurm.nodelist=node[2-3]")
    finally:
        site.inside("node3", "umount", str(site.state))
    done.expect(1, "the state directory is not shared", str(site.state))
    assert re.search(r"^ +node3: the state directory is not shared", done.err, re.MULTILINE)
    assert "node2:" not in done.err


# --- Slurm ----------------------------------------------------------------------------------------------


def test_no_slurm(site: Site, empty: dict[str, str]) -> None:
    path = {**empty, "PATH": f"{BIN}{os.pathsep}/nowhere"}
    env = ["/usr/bin/env", "-u", "SLURM_CONF", "/usr/bin/env"]
    for command in (["up", "--backend", "slurm"], ["submit", site.state / "home" / "good.yaml"]):
        done = subprocess.run(
            [*env, str(BIN / "raylaunch"), *map(str, command), *(["--backend", "slurm"] * (command[0] != "up"))],
            env={**site.env, **path}, cwd="/", capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 1 and done.stdout == "", done
        assert "`sbatch` cannot be run" in done.stderr and "login node" in done.stderr
        assert "cluster.backend" in done.stderr and "Traceback" not in done.stderr


def test_slurmctld_is_down(site: Site, empty: dict[str, str]) -> None:
    """Its clients go on trying for 9 s; each question is asked once."""
    real = Path(site.sandbox.env()["SLURM_CONF"])
    dead = site.state / "home" / "dead.conf"
    dead.write_text(re.sub(r"(?m)^SlurmctldPort=.*", "SlurmctldPort=9", real.read_text()))
    env = {"SLURM_CONF": str(dead)}
    words = ["Unable to contact slurm controller", "Slurm's controller is down", "scontrol ping"]
    began = time.monotonic()
    done = site.run("up", "--backend", "slurm", env={**env, **empty}).expect(1, "sbatch", *words)
    assert time.monotonic() - began < 25 and done.out == ""

    # A cluster that lives meanwhile is unknown, neither down nor touched.
    site.run("up", "--name", "alive", "--no-wait").expect(0)
    try:
        found = site.run("status", "--json", env=env).expect(0).out
        assert '"unknown"' in found and "Unable to contact slurm controller" in found
        site.run("down", "alive", env=env).expect(1, *words)
        assert len(site.jobs()) == 1
    finally:
        site.run("down", "alive").expect(0)
