"""Bad input that a real Slurm refuses, and state directories that it cannot use: a clear error that names the thing and
the next step, the right exit code (2 for usage, 1 for failure), never a traceback, and nothing left behind.
What needs no scheduler: tests/unit/test_bad_input.py."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from helpers import NOBODY, Site, mounted, wait_for
from shared import Ground

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

GOOD = "slurm: {nodes: 1}\n"


@pytest.fixture
def good(site: Site) -> Path:
    """A config that nothing is wrong with."""
    path = site.state / "home" / "good.yaml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def empty(site: Site) -> Iterator[dict[str, str]]:
    """A state directory that does not exist yet, as an environment; no job and nothing in it afterwards."""
    path = site.state / "empty"
    yield {"RAYLAUNCH_STATE_DIR": str(path)}
    wait_for("no job", lambda: not site.jobs(), 60, lambda: str(site.jobs()))
    assert not list(path.glob("*/[!.]*")), "a cluster or run is half made"


# Arguments of `up`, exit code, words that must be said (`a|b`: one of them).
UP = [
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


@pytest.mark.parametrize(("line", "code", "words"), UP, ids=[row[0] for row in UP])
def test_up(site: Site, empty: dict[str, str], line: str, code: int, words: Sequence[str]) -> None:
    done = site.run("up", *line.split(), env=empty).expect(code)
    assert done.out == ""
    for word in words:
        assert any(option in done.err for option in word.split("|")), (word, str(done))
    assert done.err.startswith(("error: ", "Usage: ", "[")) and "raylaunch.errors" not in done.err


def test_submit(site: Site, good: Path, empty: dict[str, str]) -> None:
    done = site.run("submit", good, "--partition", "nope", env=empty)
    done.expect(1, "invalid partition specified: nope")
    assert done.out == ""


# --- the state directory --------------------------------------------------------------------------------


def test_a_full_state_directory(site: Site, good: Path) -> None:
    with mounted(site.state / "full", "16k") as path:
        with (path / "filling").open("wb", buffering=0) as out, pytest.raises(OSError, match="No space left"):
            while True:
                out.write(bytes(1024))
        done = site.run("up", "--state-dir", path)
        done.expect(1, str(path), "No space left on device", "free some space", "cluster.state_dir")
        done = site.run("submit", good, "--state-dir", path)
        done.expect(1, str(path), "No space left on device")
        assert done.out == "" and not site.jobs()
        assert not list(path.glob("*/*/[!.]*")), "what could be written is removed again"


def test_a_read_only_state_directory(site: Site, good: Path) -> None:
    with mounted(site.state / "fixed", "1M") as path:
        subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
        site.run("up", "--state-dir", path).expect(1, str(path), "Read-only file system", "--state-dir")
        site.run("submit", good, "--state-dir", path).expect(1, "Read-only")
        site.run("status", "--state-dir", path).expect(0, "no cluster is up")


def test_a_state_directory_and_a_file_that_are_not_ours(site: Site, idle: Ground, common_python: Path) -> None:
    bob = idle.site(NOBODY, common_python)
    closed = site.state / "closed"
    closed.mkdir(mode=0o700)
    secret = site.state / "home" / "closed.yaml"
    secret.write_text(GOOD)
    secret.chmod(0o600)
    bob.run("up", env={"RAYLAUNCH_STATE_DIR": str(closed)}).expect(1, str(closed), "Permission denied")
    bob.run("up", "--state-dir", closed).expect(2, "--state-dir", str(closed))
    bob.run("up", "-c", secret).expect(2, "closed.yaml", "is not readable")
    bob.run("status").expect(0, "no cluster is up")
    bob.wait_clean()


def test_a_state_directory_that_no_node_has(site: Site, tmp_path: Path) -> None:
    """/tmp is every node's own. The login node's is not theirs."""
    assert tmp_path.is_relative_to("/tmp")
    done = site.run("up", "--nodes", 2, "--state-dir", tmp_path)
    done.expect(1, str(tmp_path), "do not share the state directory", "cluster.state_dir")


@pytest.mark.long
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


@pytest.mark.long
def test_slurmctld_is_down(site: Site, empty: dict[str, str]) -> None:
    """Slurm's clients go on trying for 9 s: each question is asked once."""
    real = Path(site.sandbox.env()["SLURM_CONF"])
    dead = site.state / "home" / "dead.conf"
    dead.write_text(re.sub(r"(?m)^SlurmctldPort=.*", "SlurmctldPort=9", real.read_text()))
    env = {"SLURM_CONF": str(dead)}
    words = ["Unable to contact slurm controller", "Slurm's controller is down", "scontrol ping"]
    with site.slurm_calls() as (noted, calls):
        done = site.run("up", "--backend", "slurm", env={**noted, **env, **empty}).expect(1, "sbatch", *words)
    assert done.out == ""
    assert calls and len(calls) == len(set(calls)), calls

    # A cluster that lives meanwhile is unknown, neither down nor touched.
    site.run("up", "--name", "alive", "--no-wait").expect(0)
    try:
        found = site.run("status", "--json", env=env).expect(0).out
        assert '"unknown"' in found and "Unable to contact slurm controller" in found
        site.run("down", "alive", env=env).expect(1, *words)
        assert len(site.jobs()) == 1
    finally:
        site.run("down", "alive").expect(0)
