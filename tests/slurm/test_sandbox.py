"""The sandbox: what it promises about nodes, faults, users and leaving nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import LIMIT

from raylaunch.cli.sandbox import sandbox as cli
from raylaunch.errors import SandboxError, UsageError
from raylaunch.tools.sandbox import Sandbox, daemons, missing, slurm_conf, take_down
from raylaunch.tools.sandbox.procs import Proc, wait_for
from raylaunch.tools.sandbox.spec import SandboxLayout, SandboxSpec
from raylaunch.tools.sandbox.teardown import leftovers

pytestmark = pytest.mark.slurm

Make = Callable[..., Sandbox]
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
COMMAND = [sys.executable, "-c", "from raylaunch.cli.sandbox import sandbox; sandbox()"]

SERVER = """
import socket
s = socket.create_server(("0.0.0.0", 7001))
print("ready", flush=True)
c, _ = s.accept()
c.recv(1)
"""
CLIENT = """
import socket, sys
c = socket.create_connection((sys.argv[1], 7001), timeout=30)
print("ready", flush=True)
c.settimeout(float(sys.argv[2]))
try:
    print("closed" if c.recv(1) == b"" else "data")
except TimeoutError:
    print("silence")
except ConnectionResetError:
    print("closed")
"""
CONNECT = """
import socket, sys
s = socket.socket(); s.settimeout(0.5)
try:
    s.connect((sys.argv[1], 6818)); print("yes")
except OSError:
    print("no")
"""


def slurm(sandbox: Sandbox, *argv: str, ok: bool = True, timeout: float = LIMIT) -> str:
    """Output of a Slurm command in that sandbox."""
    env = {**os.environ, **sandbox.env()}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0 or not ok, done.stderr
    return done.stdout


def inside(sandbox: Sandbox, node: str, *argv: str) -> str:
    """Output of a command in a node."""
    done = sandbox.exec(node, argv, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def reaches(sandbox: Sandbox, source: str, target: str) -> bool:
    """Whether a node can connect to another one's slurmd."""
    answer = inside(sandbox, source, sys.executable, "-c", CONNECT, sandbox.spec.address(target))
    return answer.strip() == "yes"


def wait_reaches(sandbox: Sandbox, source: str, target: str) -> None:
    wait_for(f"{source} reaches {target}", lambda: reaches(sandbox, source, target), LIMIT)


def state_of(sandbox: Sandbox, job: str) -> str:
    return slurm(sandbox, "squeue", "-h", "-j", job, "-o", "%T").strip()


# --- a cluster that works -------------------------------------------------------------------


def test_four_nodes_run_a_job_as_soon_as_up_returns(sandbox: Sandbox) -> None:
    assert sorted(slurm(sandbox, "srun", "-N4", "hostname").split()) == ["node1", "node2", "node3", "node4"]
    script = "#!/bin/sh\nsrun hostname\n"
    env = {**os.environ, **sandbox.env()}
    out = sandbox.layout.state / "job.out"
    subprocess.run(
        ["sbatch", "--wait", "-N4", "-o", str(out)], input=script, text=True, env=env, timeout=LIMIT, check=True
    )
    assert sorted(out.read_text().split()) == ["node1", "node2", "node3", "node4"]


def test_partitions(sandbox: Sandbox) -> None:
    rows = slurm(sandbox, "sinfo", "-h", "-o", "%P %a %l %D").splitlines()
    assert sorted(row.split()[0] for row in rows) == ["down", "low", "lowc", "main*", "small"]
    assert "small up 10:00 1" in rows
    assert any(row.startswith("down down") for row in rows)


def test_a_node_has_its_own_everything_but_the_shared_file_system(sandbox: Sandbox) -> None:
    marker = sandbox.layout.state / "shared"
    inside(sandbox, "node1", "sh", "-c", f"touch {marker} /tmp/private /dev/shm/private")
    assert marker.exists()
    assert inside(sandbox, "node2", "ls", "/tmp", "/dev/shm").split() == ["/dev/shm:", "/tmp:"]
    assert not Path("/dev/shm/private").exists()
    assert inside(sandbox, "node1", "stat", "-c", "%a", "/tmp", "/dev/shm").split() == ["1777", "1777"]
    assert inside(sandbox, "node2", "hostname", "-I").split() == [sandbox.spec.address("node2")]
    # The node's name is its address on the network, for itself and for the others.
    for node in ("node1", "node2"):
        assert inside(sandbox, node, "getent", "hosts", "node1").split()[0] == sandbox.spec.address("node1")
    assert "UP" in inside(sandbox, "node1", "ip", "link", "show", "lo")
    machine = float(Path("/proc/uptime").read_text().split()[0])
    assert float(inside(sandbox, "node1", "cat", "/proc/uptime").split()[0]) < machine
    assert inside(sandbox, "node1", "cat", "/proc/1/comm").startswith("python")
    inside(sandbox, "node1", "rm", "/tmp/private", "/dev/shm/private")


def test_a_daemon_that_left_its_session_ends_with_its_job(sandbox: Sandbox) -> None:
    pid_file = sandbox.layout.state / "daemon"
    slurm(sandbox, "srun", "-w", "node1", "sh", "-c", f"setsid sleep 1234 & echo $! > {pid_file}")

    def gone() -> bool:
        return "sleep 1234" not in inside(sandbox, "node1", "ps", "-eo", "args")

    wait_for("the daemon gone", gone, LIMIT)


def test_gpus_are_counted_and_handed_out(make_sandbox: Make) -> None:
    sandbox = make_sandbox(nodes=1, cpus=4, gpus=4)
    out = slurm(sandbox, "srun", "-n2", "--gpus-per-task=2", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert sorted(out.split()) == ["0,1", "2,3"]
    refused = subprocess.run(
        ["srun", "--gpus-per-node=5", "true"],
        env={**os.environ, **sandbox.env()},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert refused.returncode != 0


@pytest.mark.long
def test_accounting(make_sandbox: Make) -> None:
    sandbox = make_sandbox(nodes=1, accounting=True)
    slurm(sandbox, "srun", "true")
    # slurmctld sends to slurmdbd now and then, not at once.
    wait_for("sacct", lambda: "COMPLETED" in slurm(sandbox, "sacct", "-n", "-P", "-o", "state"), LIMIT)


@pytest.mark.long
def test_why_of_jobs_that_raylaunch_never_saw(make_sandbox: Make) -> None:
    sandbox = make_sandbox(nodes=1, cpus=4, accounting=True)

    def submit(wrap: str) -> str:
        where = str(sandbox.layout.state / "job-%j.out")
        return slurm(sandbox, "sbatch", "--parsable", "-n1", "-c1", "-o", where, "--wrap", wrap).strip()

    def why(job: str) -> tuple[str, str]:
        words = [sys.executable, "-c", "from raylaunch.cli import main; main()", "why", job, "--json"]
        told = json.loads(slurm(sandbox, *words, timeout=LIMIT))
        return told["kind"], told["cause"]

    runs, fails, raises = submit("sleep 999"), submit("exit 3"), submit("python3 -c 'import no_such_module'")
    wait_for("two to end", lambda: slurm(sandbox, "squeue", "-h", "-o", "%i").split() == [runs], LIMIT)
    wait_for("one to run", lambda: state_of(sandbox, runs) == "RUNNING", LIMIT)
    assert why(runs) == ("unknown", f"job {runs} is running and has not ended")
    slurm(sandbox, "scancel", runs)
    wait_for("accounting", lambda: why(fails) == ("unknown", f"job {fails} ended with exit code 3"), LIMIT)
    assert why(raises)[0] == "import_error"  # its output was found by Slurm's word
    wait_for("its end", lambda: why(runs) == ("unknown", f"job {runs} was cancelled"), LIMIT)


def test_another_user_submits_jobs(sandbox: Sandbox) -> None:
    place = sandbox.layout.state / "nobody"
    slurm(sandbox, *NOBODY, "mkdir", str(place))
    out = place / "out"
    files = "/tmp/of-nobody /dev/shm/of-nobody"
    wrap = f"id -u > {out}; touch {files} && rm {files} && echo ok >> {out}"
    slurm(sandbox, *NOBODY, "sbatch", "-o", "/dev/null", "--wrap", wrap)
    wait_for("the job's output", lambda: out.exists() and out.read_text().split() == ["65534", "ok"], LIMIT)
    assert slurm(sandbox, *NOBODY, "srun", "-N4", "id", "-u").split() == ["65534"] * 4
    assert "COMPLETED" in slurm(sandbox, *NOBODY, "sacct", "-c", "-n", "-o", "state")


def test_two_sandboxes_do_not_meet(sandbox: Sandbox, make_sandbox: Make) -> None:
    other = make_sandbox(nodes=2)
    job = slurm(other, "sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 100").strip()
    assert state_of(other, job) in ("PENDING", "RUNNING")
    wait_for("no job of the first one's", lambda: not slurm(sandbox, "squeue", "-h"), LIMIT)
    assert slurm(other, "srun", "--overlap", "-w", "node2", "hostname") == "node2\n"
    assert not other.status().nodes[0].address.startswith(sandbox.spec.gateway.removesuffix("1"))
    # A credential of one munged means nothing to the other.
    made = subprocess.run(["munge", "-n", f"--socket={other.layout.munge_socket}"], capture_output=True, check=True)
    read = subprocess.run(
        ["unmunge", f"--socket={sandbox.layout.munge_socket}"],
        input=made.stdout,
        capture_output=True,
        check=False,
    )
    assert read.returncode != 0


# --- faults ---------------------------------------------------------------------------------


def test_kill_ends_all_at_once_and_start_brings_it_back(make_sandbox: Make) -> None:
    sandbox = make_sandbox(nodes=2)
    command = sandbox.popen("node2", ["sleep", "1000"])
    job = slurm(sandbox, "sbatch", "--parsable", "-w", "node2", "-o", "/dev/null", "--wrap", "sleep 999")
    wait_for("job runs", lambda: state_of(sandbox, job.strip()) == "RUNNING", LIMIT)
    init = sandbox.status().nodes[1].pid
    assert init is not None

    sandbox.kill("node2")
    assert not Path(f"/proc/{init}/ns/net").exists()
    assert command.wait(timeout=LIMIT) != 0
    after = sandbox.status().nodes
    assert (after[0].running, after[1].running, after[1].pid) == (True, False, None)
    with pytest.raises(SandboxError, match="not running"):
        sandbox.exec("node2", ["true"])
    with pytest.raises(SandboxError, match="not running"):
        sandbox.kill("node2")

    sandbox.start("node2")
    with pytest.raises(SandboxError, match="running already"):
        sandbox.start("node2")
    assert slurm(sandbox, "srun", "-N2", "hostname").split().count("node2") == 1
    # Slurm noticed the reboot: the job is not taken for running.
    assert state_of(sandbox, job.strip()) == "PENDING"


@pytest.mark.long
def test_start_leaves_the_verdict_to_slurm_when_asked(make_sandbox: Make) -> None:
    sandbox = make_sandbox(nodes=2)
    slurm(sandbox, "scontrol", "update", "nodename=node1", "state=drain", "reason=ours")
    sandbox.kill("node1")
    sandbox.start("node1", resume=False)
    status = sandbox.status().nodes[0]
    assert (status.running, status.reason) == (True, "ours")


@pytest.mark.long
def test_what_peers_hear_of_a_death(make_sandbox: Make) -> None:
    sandbox = make_sandbox(nodes=3)
    pipe = {"stdout": subprocess.PIPE, "text": True}
    for node, silent, heard, patience in [("node2", False, "closed", LIMIT), ("node3", True, "silence", 2)]:
        server = sandbox.popen(node, [sys.executable, "-c", SERVER], **pipe)
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        line = [sys.executable, "-c", CLIENT, sandbox.spec.address(node), str(patience)]
        client = sandbox.popen("node1", line, **pipe)
        assert client.stdout is not None and client.stdout.readline() == "ready\n"
        sandbox.kill(node, silent=silent)
        assert client.communicate(timeout=LIMIT)[0] == f"{heard}\n"
        server.communicate(timeout=LIMIT)


@pytest.mark.long
def test_slurm_calls_a_dead_node_down(make_sandbox: Make) -> None:
    sandbox = make_sandbox(nodes=2)
    sandbox.kill("node2", silent=True)
    wait_for("node2 down", lambda: sandbox.status().nodes[1].slurm.startswith("down"), LIMIT)
    sandbox.start("node2")
    assert sandbox.status().nodes[1].slurm == "idle"


def test_cut_and_heal(sandbox: Sandbox) -> None:
    wait_reaches(sandbox, "node1", "node2")
    sandbox.cut("node2")
    try:
        assert [node.cut for node in sandbox.status().nodes] == [False, True, False, False]
        assert not reaches(sandbox, "node1", "node2")
        assert not reaches(sandbox, "node2", "node1")
        wait_reaches(sandbox, "node1", "node3")
        # The node itself sees its cable plugged in.
        assert "LOWER_UP" in inside(sandbox, "node2", "ip", "link", "show", "eth0")
    finally:
        sandbox.heal("node2")
    wait_reaches(sandbox, "node1", "node2")
    assert not any(node.cut for node in sandbox.status().nodes)


def test_freeze_and_thaw(make_sandbox: Make) -> None:
    sandbox = make_sandbox(nodes=2)
    counts = {node: sandbox.layout.state / f"count-{node}" for node in ("node1", "node2")}
    for node, count in counts.items():
        script = f"while :; do echo >> {count}; sleep 0.01; done"
        slurm(sandbox, "sbatch", "-w", node, "-o", "/dev/null", "--wrap", script)
        wait_for("counting", count.exists, LIMIT)

    def goes_on(node: str) -> None:
        before = counts[node].stat().st_size
        wait_for(f"{node} counts on", lambda: counts[node].stat().st_size > before + 5, LIMIT)

    sandbox.freeze("node1")
    frozen_at = counts["node1"].stat().st_size
    assert sandbox.status().nodes[0].frozen
    goes_on("node2")
    assert counts["node1"].stat().st_size == frozen_at
    sandbox.thaw("node1")
    goes_on("node1")


@pytest.mark.long
def test_a_returned_node_is_neither_frozen_nor_cut_nor_a_stranger(make_sandbox: Make) -> None:
    sandbox = make_sandbox(nodes=2)
    wait_reaches(sandbox, "node1", "node2")  # node1 now knows node2's hardware address
    sandbox.cut("node2")
    sandbox.freeze("node2")
    sandbox.kill("node2")  # a frozen node can die
    sandbox.start("node2")
    status = sandbox.status().nodes[1]
    assert (status.frozen, status.cut) == (False, False)
    wait_reaches(sandbox, "node1", "node2")


@pytest.mark.long
def test_status_shows_a_dead_slurmctld(make_sandbox: Make) -> None:
    sandbox = make_sandbox(nodes=1)
    proc = Proc.load(daemons.record(sandbox.layout, "slurmctld"))
    assert proc is not None
    proc.kill()
    wait_for("slurmctld gone", lambda: not proc.alive(), LIMIT)
    status = sandbox.status()
    assert status.daemons == {"munged": True, "slurmctld": False}
    assert status.nodes[0].running and status.nodes[0].slurm == "unknown"


# --- leaving nothing ------------------------------------------------------------------------


def test_down_after_kills_leaves_nothing_and_may_be_repeated(spare_name: str) -> None:
    sandbox = Sandbox.up(spare_name, nodes=3)
    sandbox.kill("node2")
    sandbox.freeze("node3")
    slurm(sandbox, "sbatch", "-w", "node1", "-o", "/dev/null", "--wrap", "setsid sleep 1000")
    assert leftovers(sandbox.layout) != []
    assert sandbox.down() is True
    assert leftovers(sandbox.layout) == []
    assert sandbox.down() is False
    assert take_down(spare_name) is False


@pytest.mark.long
def test_down_after_up_was_killed(spare_name: str) -> None:
    layout = SandboxLayout(spare_name)
    moments = (layout.dir, layout.slurm_conf, *(daemons.record(layout, name) for name in ("munged", "slurmctld")))
    for made in (*moments, layout.run / "node1.json", layout.spec):
        up = subprocess.Popen([*COMMAND, "up", "--name", spare_name], stdout=subprocess.DEVNULL)
        wait_for(made.name, made.exists, LIMIT)
        up.send_signal(signal.SIGKILL)
        up.wait()
        if not layout.spec.exists():
            with pytest.raises(SandboxError, match="is incomplete"):
                Sandbox.load(spare_name)
        assert take_down(spare_name) is True
        assert leftovers(layout) == []


def test_an_up_that_fails_takes_itself_down(spare_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def text(spec: SandboxSpec, layout: SandboxLayout) -> str:
        return real(spec, layout) + "NoSuchSetting=1\n"

    real = slurm_conf.slurm_conf
    monkeypatch.setattr(slurm_conf, "slurm_conf", text)
    with pytest.raises(SandboxError, match="slurmctld ended") as caught:
        Sandbox.up(spare_name, nodes=2)
    assert "NoSuchSetting" in caught.value.hint
    assert leftovers(SandboxLayout(spare_name)) == []


# --- the command line -----------------------------------------------------------------------


def test_env_is_for_eval(sandbox: Sandbox) -> None:
    line = f'eval "$({subprocess.list2cmdline(COMMAND[:1])} -c "$1" env --name {sandbox.spec.name})"'
    script = f'{line}; sinfo -h -p main -o %D; cd "$RAYLAUNCH_STATE_DIR" && pwd'
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "RAYLAUNCH"))}
    done = subprocess.run(
        ["sh", "-c", script, "sh", COMMAND[2]],
        env=env,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    assert done.stdout.split() == ["4", str(sandbox.layout.state)]


def test_exec_passes_stdio_and_exit_status(sandbox: Sandbox) -> None:
    line = [*COMMAND, "exec", "node3", "--name", sandbox.spec.name, "--", "sh", "-c", "cat; hostname; exit 7"]
    done = subprocess.run(line, input="hello\n", capture_output=True, text=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stdout) == (7, "hello\nnode3\n")


def test_exec_ends_the_command_when_it_is_killed(sandbox: Sandbox) -> None:
    command = sandbox.popen("node1", ["sh", "-c", "echo ready; exec sleep 4321"], stdout=subprocess.PIPE)
    assert command.stdout is not None and command.stdout.readline() == b"ready\n"
    command.kill()
    command.communicate(timeout=LIMIT)
    wait_for("gone", lambda: "sleep 4321" not in inside(sandbox, "node1", "ps", "-eo", "args"), LIMIT)


@pytest.mark.long
def test_the_verbs(spare_name: str) -> None:
    def run(*args: str) -> str:
        result = CliRunner().invoke(cli, [*args, "--name", spare_name], catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    assert "node1, node2" in run("up", "--nodes", "2", "--cpus", "2")
    assert "node1" in run("status")
    run("cut", "node1")
    run("freeze", "node2")
    nodes = json.loads(run("status", "--json"))["nodes"]
    assert [(node["cut"], node["frozen"]) for node in nodes] == [(True, False), (False, True)]
    assert "cut" in run("status") and "frozen" in run("status")
    run("heal", "node1")
    run("thaw", "node2")
    run("kill", "node2", "--silent")
    assert "dead" in run("status")
    run("start", "node2")
    assert "is down" in run("down")
    assert "nothing to do" in run("down")


def test_bad_input_is_told(sandbox: Sandbox) -> None:
    name = sandbox.spec.name
    for args, error, text in [
        (["up", "--nodes", "0"], UsageError, "--nodes 0"),
        (["up", "--cpus", "0"], UsageError, "--cpus 0"),
        (["up", "--gpus", "-1"], UsageError, "--gpus -1"),
        (["up", "--name", "Not_a_name"], UsageError, "lower-case"),
        (["up", "--name", name], SandboxError, f"down --name {name}"),
        (["env", "--name", "nowhere"], SandboxError, name),
        (["kill", "node9", "--name", name], UsageError, "node1, node2, node3, node4"),
        (["exec", "node9", "--name", name, "--", "true"], UsageError, "node1, node2"),
        (["heal", "head", "--name", name], UsageError, "has no node 'head'"),
    ]:
        result = CliRunner().invoke(cli, args)
        assert isinstance(result.exception, error), (args, result.output)
        assert text in str(result.exception)


# --- without a cluster ----------------------------------------------------------------------


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    reason = missing()
    assert "apt-get install -y" in reason and "slurm-wlm-basic-plugins" in reason and "\n" not in reason
    assert "mariadb-server" not in reason
    assert "mariadb-server" in missing(accounting=True)
    with pytest.raises(SandboxError) as caught:
        Sandbox.up("never")
    assert caught.value.hint.startswith("apt-get install")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in missing()


def test_it_imports_the_standard_library_only() -> None:
    code = (
        "import sys, raylaunch.tools.sandbox;"
        "print([m for m in ('ray', 'torch', 'numpy', 'click', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
