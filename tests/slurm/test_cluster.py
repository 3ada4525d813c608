"""Bringing clusters up on Slurm, looking at them, and taking them down: nothing but theirs is touched, and
nothing is left. Run as people run it, against a real Slurm of four nodes."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import BIN, LIMIT, NOBODY, Done, Site, wait_for
from shared import SECRET, Ground, Up

from raylaunch.cluster.membership.control_channel import ControlClient, Refused
from raylaunch.host.ports import PORTS_FROM, PORTS_TO
from raylaunch.host.temp_dir import temp_dir_path
from raylaunch.state import files
from raylaunch.state.members import NodeInfo

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

NODE = NodeInfo(state="starting")
LISTENING = "ss -Hltnp | awk '{print $4, $6}'"
GCS = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1]).get_all_node_info()
"""
HOLD_PORTS = """
import socket, sys
from raylaunch.errors import BringUpError
from raylaunch.host.ports import lease_ports
leases = []
while True:
    try:
        leases.append(lease_ports())
    except BringUpError:
        break
held = [socket.create_server(("", lease.ports.gcs)) for lease in leases[1:]]
for lease in leases:
    lease.close()
print(leases[0].ports.base, flush=True)
held[0].accept()
"""
"""Hold one port of every free block but one, whose base is said."""


@pytest.fixture
def cluster(site: Site) -> Iterator[Callable[..., Done]]:
    """`cluster(name, …)`: a cluster for one test, taken down behind it, with nothing left."""
    names = []

    def make(name: str, *options: object) -> Done:
        names.append(name)
        return site.run("up", "--name", name, *options)

    yield make
    for name in names:
        site.run("down", name).expect(0)
    site.wait_clean()


# --- a cluster that is up ---------------------------------------------------------------------------


def dashboard_port(site: Site) -> int:
    return int(files.read_json(site.cluster("main") / "head.json")["dashboard_port"])


def test_up_says_where_it_stands_and_what_is_next(main: Up) -> None:
    site, said, port = main.site, main.said, dashboard_port(main.site)
    for line in ("the head starts on node1", "3 nodes are ready"):
        assert line in said.err
    assert "cluster main is ready: 3 nodes (node1, node2, node3), 6 CPUs" in said.out
    assert f"http://127.0.0.1:{port} on node1" in said.out
    assert re.search(rf"ssh -N -L {port}:127\.0\.0\.1:{port} \S+@node1$", said.out, re.MULTILINE)
    assert said.out.rstrip().splitlines()[-1].split(None, 1)[1] == "raylaunch train cfg.yaml"
    assert "\x1b" not in said.all  # plain lines where there is no terminal
    (job,) = site.slurm("squeue", "-h", "-n", "raylaunch-main", "-u", "0", "-o", "%i %T %j %D %k").splitlines()
    number, _, rest = job.partition(" ")
    assert re.fullmatch(r"RUNNING raylaunch-main 3 raylaunch cluster=main life=\w+; two words", rest)
    assert "Nice=7" in site.slurm("scontrol", "show", "job", number)


def test_status_as_json(main: Up) -> None:
    site, found = main.site, main.site.cluster_status("main")
    wanted = {"name", "backend", "state", "incarnation", "jobs", "nodes", "dashboard", "runs"}
    assert wanted <= found.keys()
    assert (found["backend"], found["state"], found["incarnation"]) == ("slurm", "ready", 1)
    assert {run["cluster"] for run in found["runs"]} <= {"main"}  # those of other tests
    (job,) = found["jobs"]
    assert {"id", "state", "nodes"} <= job.keys()
    assert (job["state"], job["nodes"]) == ("RUNNING", ["node1", "node2", "node3"])
    rows = [(n["name"], n["address"], n["role"], n["state"]) for n in found["nodes"]]
    roles = {"node1": "head", "node2": "worker", "node3": "worker"}
    assert rows == [(name, site.sandbox.spec.address(name), role, "ready") for name, role in roles.items()]
    assert str(dashboard_port(site)) in json.dumps(found["dashboard"])


OPENED = """
import os, sys
place, log = os.environ["RAYLAUNCH_STATE_DIR"], os.open(os.environ["OPENED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def look(event, arguments):
    if event == "open" and str(arguments[0]).startswith(place):
        os.write(log, f"{arguments[0]}\\n".encode())
sys.addaudithook(look)
from raylaunch.cli import main
main()
"""
"""The command line, with each file of the state directory that it opens noted down."""


def test_status_asks_slurm_once_and_reads_each_file_at_most_twice(main: Up) -> None:
    opened = main.site.state / "home" / "opened"
    opened.unlink(missing_ok=True)
    site = replace(main.site, command=(sys.executable, "-c", OPENED))
    with site.slurm_calls() as (noted, calls):
        done = site.run("status", env={**noted, "OPENED": str(opened)})
    done.expect(0, "main", "ready", "node1", "head", "node2", "worker", "RUNNING")
    assert [call.split()[0] for call in calls] == ["squeue"]
    counts = Counter(opened.read_text().splitlines())
    assert any(path.endswith("members.json") for path in counts)
    assert max(counts.values()) <= 2, counts.most_common(9)


def test_logs_of_a_cluster(main: Up) -> None:
    site = main.site
    both = site.run("logs", "main").expect(0, "Ray runtime started").out
    assert any(line.startswith("node1: ") for line in both.splitlines())
    assert any(line.startswith("node2: ") for line in both.splitlines())
    one = site.run("logs", "main", "--node", "node2").expect(0, "Ray runtime started").out
    assert site.sandbox.spec.address("node2") in one and site.sandbox.spec.address("node1") not in one
    site.run("logs", "main", "--node", "node9").expect(2, "node9")
    site.run("logs", "main", "--rank", "0").expect(2, "--rank")
    # A reader that goes away is no failure of ours.
    piped = f"{BIN}/raylaunch logs main | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", piped], env=site.env, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


def test_the_dashboard_is_for_the_head_alone(main: Up) -> None:
    site, port = main.site, dashboard_port(main.site)
    out = site.run("dashboard").expect(0).out.splitlines()
    assert out[0] == f"http://127.0.0.1:{port} on node1"
    assert re.search(rf"ssh -N -L {port}:127\.0\.0\.1:{port} \S+@node1$", out[1])
    assert site.run("dashboard", "main").expect(0).out.splitlines() == out
    get = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=30).status)"
    here = [sys.executable, "-c", get, f"http://127.0.0.1:{port}/"]
    # It starts once the minimum of nodes is ready, so a moment after `up` has returned.
    wait_for(
        "the dashboard answers on the head's loopback",
        lambda: site.sandbox.exec("node1", here, capture_output=True, text=True, timeout=LIMIT).stdout.strip() == "200",
        LIMIT,
    )
    from_elsewhere = [sys.executable, "-c", get, f"http://{site.sandbox.spec.address('node1')}:{port}/"]
    done = site.sandbox.exec("node2", from_elsewhere, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode != 0 and "Connection refused" in done.stderr


def test_a_name_that_is_alive_is_refused(main: Up) -> None:
    written_by_up = ("cluster.json", "config.yaml", "script.sbatch", "token", "head.json")

    def contents() -> dict[str, bytes]:
        return {name: (main.directory / name).read_bytes() for name in written_by_up}

    before, jobs = contents(), main.site.jobs()
    done = main.site.run("up", "--nodes", 1).expect(2, "main", "already running", "raylaunch down main", "--name")
    assert done.out == ""
    assert main.site.jobs() == jobs and contents() == before


def test_a_wrong_token_is_refused(main: Up) -> None:
    site = main.site
    head = files.read_json(main.directory / "head.json")
    ours = (main.directory / "token").read_text().strip()

    async def knock(token: str, incarnation: int) -> None:
        link = await ControlClient.connect(head["address"], head["control_port"], token, incarnation, "node9", NODE)
        link.close()

    with pytest.raises(Refused, match="wrong token"):
        asyncio.run(knock(files.new_token(), head["incarnation"]))
    with pytest.raises(Refused, match="incarnation"):
        asyncio.run(knock(ours, head["incarnation"] + 1))
    for token in (None, files.new_token()):
        mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        done = subprocess.run(
            [sys.executable, "-c", GCS, head["gcs"]], env={**site.env, **mode}, cwd="/",
            capture_output=True, text=True, timeout=LIMIT, check=False,
        )  # fmt: skip
        assert done.returncode != 0 and "InvalidAuthToken" in done.stderr, done.stderr
    assert set(site.members("main")) == {"node1", "node2", "node3"}
    assert site.cluster_status("main")["state"] == "ready"


def test_all_ports_are_of_the_leased_block(main: Up) -> None:
    for node, member in main.site.members("main").items():
        low, high = member["ports"]
        assert low >= PORTS_FROM and high < PORTS_TO
        for line in main.site.inside(node, "sh", "-c", LISTENING).splitlines():
            address, who = line.split(None, 1)
            if not re.search(r'"(slurmd|slurmstepd|srun)"', who):
                assert low <= int(address.rpartition(":")[2]) <= high, (node, line)


def test_what_is_ours_is_ours_alone(main: Up) -> None:
    site, directory = main.site, main.directory
    assert (directory / "token").stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700
    for path in directory.rglob("[!.]*"):
        if not path.match("slurm-*.out"):  # Slurm's own making, and behind our closed door
            assert path.stat().st_mode & 0o077 == 0, path
    token = (directory / "token").read_text().strip()
    look = "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2> /dev/null | tr '\\0' '\\n'"
    for node, member in site.members("main").items():
        mode, owner = site.inside(node, "stat", "-c", "%a %u", member["temp_dir"]).split()
        assert (mode, owner) == ("700", "0")
        assert token not in site.inside(node, "sh", "-c", look)


def test_a_secret_is_on_the_nodes_and_in_no_file(main: Up) -> None:
    site = main.site
    pid = site.members("main")["node2"]["pid"]
    assert f"OUR_KEY={SECRET}" in site.inside("node2", "cat", f"/proc/{pid}/environ").split("\0")
    roots = [main.directory, site.sandbox.layout.log]
    for path in [p for root in roots for p in root.rglob("*") if p.is_file()]:
        assert SECRET not in path.read_text(errors="replace"), path
    assert "${OUR_SECRET}" in (main.directory / "config.yaml").read_text()
    for node in site.members("main"):
        done = site.sandbox.exec(node, ["grep", "-rqF", SECRET, "/tmp"], check=False)
        assert done.returncode  # 0 is a match; 2 when a file went meanwhile
    shown = [site.run(*command).all for command in (["logs", "main"], ["status"], ["status", "--json"])]
    assert not any(SECRET in text for text in shown)


def test_resources_are_what_the_job_was_given(main: Up) -> None:
    site = main.site
    (job,) = site.cluster_status("main")["jobs"]
    row = site.slurm("scontrol", "--oneliner", "show", "job", "-d", job["id"])
    granted = [int(value) for value in re.findall(r"Nodes=\S+ CPU_IDs=\S+ Mem=(\d+)", row)]
    assert set(granted) == {3 << 10}
    for member in site.members("main").values():
        assert member["resources"]["cpus"] == 2
        assert member["resources"]["memory"] == granted[0] << 20
        assert member["resources"]["object_store"] <= member["resources"]["memory"] // 10
        environ = site.inside(member["name"], "cat", f"/proc/{_raylet(site, member['name'])}/environ")
        assert "OMP_NUM_THREADS=2" in environ.split("\0")


def _raylet(site: Site, node: str) -> str:
    return next(row.split()[0] for row in site.processes(node) if "/raylet " in row)


@pytest.mark.long  # as tests/chaos has it, with a run
def test_a_raylet_that_dies_is_started_again(main: Up) -> None:
    site, before = main.site, _raylet(main.site, "node2")
    known = len(site.events(main.directory))
    site.inside("node2", "kill", "-9", before)

    def back() -> bool:
        kinds = [row["kind"] for row in site.events(main.directory)[known:] if row.get("node") == "node2"]
        return "node_restarting" in kinds and kinds[-1] == "node_ready"

    wait_for("node2 back", back, LIMIT, lambda: str(site.events(main.directory)))
    assert _raylet(site, "node2") != before
    main.heal()
    assert site.cluster_status("main")["state"] == "ready"


def test_two_users_on_the_same_nodes_do_not_meet(main: Up, busy: Ground, common_python: Path) -> None:
    site, other = main.site, busy.site(NOBODY, common_python)
    before = {node: _raylet(site, node) for node in ("node1", "node2")}
    jobs = site.jobs()
    place = ["--nodes", 2, "--set", "slurm.nodelist=node[1-2]", "--mem", "1500M"]
    other.run("up", *place, "--cpus-per-task", 1).expect(0, "2 nodes (node1, node2)")
    mine, theirs = site.members("main"), other.members("main")
    for node in ("node1", "node2"):
        (low, high), (low_2, high_2) = mine[node]["ports"], theirs[node]["ports"]
        assert high < low_2 or high_2 < low
        assert mine[node]["temp_dir"] != theirs[node]["temp_dir"]
        assert theirs[node]["resources"]["memory"] == 1500 << 20
        owner = site.inside(node, "stat", "-c", "%u %a", theirs[node]["temp_dir"]).split()
        assert owner == [str(NOBODY), "700"]
    assert [c["state"] for c in other.status()["clusters"]] == ["ready"]
    assert [c["state"] for c in site.status()["clusters"]] == ["ready"]
    assert site.jobs() == jobs and len(other.jobs()) == 1
    # The nodes of one cluster are strangers to the other one's head.
    head = files.read_json(other.cluster("main") / "head.json")
    token = (main.directory / "token").read_text().strip()
    with pytest.raises(Refused, match="wrong token"):
        asyncio.run(
            ControlClient.connect(head["address"], head["control_port"], token, head["incarnation"], "node1", NODE)
        )

    other.run("down").expect(0, "is down: no job, process or temporary directory remains")
    other.wait_clean()
    assert {node: _raylet(site, node) for node in before} == before
    assert site.cluster_status("main")["state"] == "ready"
    # And the other way round: what is not ours cannot be ended by us.
    assert "no cluster" in other.run("down", "alice").expect(2).err


# --- its end ----------------------------------------------------------------------------------------


def test_down_leaves_nothing_and_may_be_repeated(site: Site) -> None:
    site.run("up", "--nodes", 2).expect(0)
    job = site.jobs()[0].split()[0]
    followed = site.start("logs", "main", "-f", "--node", "node1")
    followed.wait_said("Ray runtime started")
    site.run("down").expect(0, "cluster main is down: no job, process or temporary directory remains")
    followed.wait_said("ending reason='down'")
    followed.interrupt()
    followed.ended().expect(130)
    site.wait_clean()
    assert "ExitCode=0:0" in site.slurm("scontrol", "show", "job", job)
    site.run("down").expect(0, "down already")
    site.run("down", "main").expect(0, "down already")
    site.run("down", "--all").expect(0, "down already")
    (row,) = site.status()["clusters"]
    assert (row["state"], row["nodes"], row["dashboard"]) == ("down", [], None)
    assert "no cluster is up" in site.run("status").expect(0).out
    site.run("status", "--all").expect(0, "main", "down")
    kinds = [event["kind"] for event in site.events(site.cluster("main"))]
    assert kinds[0] == "submitted" and kinds[-1] == "cluster_down"
    assert {"head_started", "node_joined", "node_ready", "ending", "ended"} <= set(kinds)
    assert kinds.index("node_ready") < kinds.index("ending") < kinds.index("ended")
    assert all(event["time"] > 1.6e9 for event in site.events(site.cluster("main")))


# --- bring-ups that are not smooth ------------------------------------------------------------------


@pytest.mark.long
def test_a_taken_port_leads_to_another_block(site: Site, cluster: Callable[..., Done]) -> None:
    free, holders = {}, []
    try:
        for node in ("node1", "node2"):  # the head's block, and a worker's
            command = [sys.executable, "-c", HOLD_PORTS]
            holders.append(site.sandbox.popen(node, command, cwd="/", stdout=subprocess.PIPE))
            free[node] = int(holders[-1].stdout.readline())
        cluster("ports", "--nodes", 2).expect(0, "2 nodes (node1, node2)")
        assert {node: row["ports"][0] for node, row in site.members("ports").items()} == free
        assert f":{site.members('ports')['node1']['ports'][0] + 2}" in (site.cluster("ports") / "head.json").read_text()
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


def _temp(site: Site, name: str) -> Path:
    return temp_dir_path("/tmp", str(site.cluster(name)))


@contextmanager
def _trap(site: Site, node: str, name: str) -> Iterator[Path]:
    """Another user's directory where the cluster's temp directory should be."""
    path = _temp(site, name)
    site.inside(node, "sh", "-c", f"mkdir {path} && chown {NOBODY} {path}")
    try:
        yield path
        assert site.inside(node, "stat", "-c", "%u", str(path)).strip() == str(NOBODY)
    finally:
        site.inside(node, "rmdir", str(path))


@contextmanager
def _read_only_tmp(site: Site, node: str) -> Iterator[None]:
    site.inside(node, "mount", "-o", "remount,ro", "/tmp")
    try:
        yield
    finally:
        site.inside(node, "mount", "-o", "remount,rw", "/tmp")


@pytest.mark.long
def test_nodes_that_cannot_start_are_named(site: Site) -> None:
    """Each by its own error, Ray's own words among them; and the job is given back."""
    broken = site.state / "home" / "broken" / "ray"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(
        "raise ImportError('libold.so.7: cannot open shared object file: No such file')\n"
    )
    config = site.state / "home" / "broken.yaml"
    bad_ray = f'[ "$SLURMD_NODENAME" != node4 ] || export PYTHONPATH={broken.parent}'
    told = site.cluster("broken") / "nodes" / "node3.json"  # the other one's failure is the first
    fails = f'[ "$SLURMD_NODENAME" != node2 ] || (while [ ! -e {told} ]; do sleep 0.1; done; exit 41)'
    config.write_text(f"slurm:\n  setup:\n    - '{bad_ray}'\n    - '{fails}'\n")
    with _trap(site, "node3", "broken") as path:
        done = site.run("up", "--name", "broken", "--nodes", 4, "-c", config)
    done.expect(1, "of 4 nodes cannot start, and at least 4 are needed", "slurm.exclude")
    assert re.search(r"^ +node2: .*setup line 2 ended with 41", done.err, re.MULTILINE), str(done)
    assert re.search(rf"^ +node3: {path} belongs to uid {NOBODY}", done.err, re.MULTILINE), str(done)
    site.wait_clean()

    # What the setup line did was heard, so this is Ray's own word.
    done = site.run("up", "--name", "broken", "--nodes", "2", "-c", config, "--set", "slurm.nodelist=node[1,4]")
    done.expect(1)
    assert re.search(r"^ +node4: .*libold\.so\.7: cannot open shared object file", done.err, re.MULTILINE)
    assert "timed out" not in done.err and "raylaunch.agent" not in done.err
    site.wait_clean()


@pytest.mark.long
def test_ready_at_the_minimum_and_late_nodes_join(site: Site, cluster: Callable[..., Done]) -> None:
    flag = site.state / "home" / "flag"
    config = site.state / "home" / "late.yaml"
    wait = f'[ "$SLURMD_NODENAME" != node3 ] || while [ ! -e {flag} ]; do sleep 0.1; done'
    config.write_text(f"slurm:\n  setup: ['{wait}']\n")
    with _trap(site, "node4", "late") as path:
        done = cluster("late", "--nodes", "2:4", "-c", config)
        done.expect(0, "cluster late is ready: 2 nodes (node1, node2)", "--cluster late")
        found = site.cluster_status("late")
        assert found["state"] == "ready" and found["jobs"][0]["nodes"] == ["node1", "node2", "node3", "node4"]
        flag.touch()
        wait_for(
            "node3 joins",
            lambda: site.members("late").get("node3", {}).get("state") == "ready",
            LIMIT,
            lambda: str(site.members("late")),
        )
        (failure,) = (site.cluster("late") / "nodes").glob("*.json")
        assert failure.stem == "node4" and str(path) in failure.read_text()
        site.run("down", "late").expect(0, "is down: no job, process or temporary directory remains")


@pytest.mark.long
def test_ready_with_three_of_four(site: Site, cluster: Callable[..., Done]) -> None:
    with _read_only_tmp(site, "node3"):
        done = cluster("three", "--nodes", "3:4")
        done.expect(0, "cluster three is ready: 3 nodes (node1, node2, node4)")
        site.run("status").expect(0, "node1", "node2", "node4")
        site.run("down", "three").expect(0)


@pytest.mark.long
def test_a_head_that_cannot_start_is_told_at_once(site: Site) -> None:
    """Whoever then is the head, or nobody: nothing waits for a head that will not come."""
    with _read_only_tmp(site, "node1"):
        done = site.run("up", "--name", "headless", "--nodes", "3:4")
        assert "--timeout" not in done.err
        if done.code:
            assert re.search(r"node1: .*/tmp.*Read-only file system", done.expect(1).err)
        else:
            site.run("down", "headless").expect(0)
    site.wait_clean()


@pytest.mark.long
def test_an_old_lifes_leftovers_are_cleaned(site: Site, cluster: Callable[..., Done]) -> None:
    """A node that died with the cluster on it still has its temp directory; the next life takes it."""
    path = _temp(site, "again")
    site.inside("node1", "sh", "-c", f"mkdir -p {path}/session_old && touch {path}/session_old/x")
    cluster("again", "--nodes", 1, "--set", "slurm.nodelist=node1").expect(0)
    assert site.inside("node1", "sh", "-c", f"ls {path}/session_old 2>&1 || true").count("No such file") == 1
    first = files.read_json(site.cluster("again") / "cluster.json")
    site.slurm("scancel", site.jobs()[0].split()[0])  # behind raylaunch's back
    wait_for("the job's end", lambda: not site.jobs(), LIMIT)
    site.run("train", "/dev/null", "--cluster", "again").expect(1, "again is down", "up --name again")
    found = site.cluster_status("again")
    assert (found["state"], found["nodes"]) == ("down", [])
    done = site.run("up", "--name", "again", "--nodes", 1, terminal=True).expect(0, "cluster again is ready")
    assert "\x1b[" in done.out and "the head starts on node" in done.out  # one live line on a terminal
    second = files.read_json(site.cluster("again") / "cluster.json")
    assert second["incarnation"] == first["incarnation"] + 1 and second["canary"] != first["canary"]


# --- waiting, and changing one's mind ---------------------------------------------------------------


@pytest.fixture
def full(site: Site) -> Iterator[None]:
    """All four nodes belong to somebody else."""
    what = ["-N4", "--exclusive", "-t60", "-o/dev/null", "--wrap", "sleep infinity"]
    job = site.slurm("sbatch", "--parsable", *what).strip()
    wait_for("the queue full", lambda: f"{job} RUNNING" in site.jobs(), LIMIT)
    yield
    site.slurm("scancel", job)
    site.wait_clean()


@pytest.mark.usefixtures("full")
def test_a_full_queue(site: Site) -> None:
    command = site.start("up", "--name", "waiting", "--nodes", 2)
    command.wait_said("is pending (Resources")
    command.wait_said("estimated start 20")
    (row,) = [c for c in site.status()["clusters"] if c["name"] == "waiting"]
    assert (row["state"], row["jobs"][0]["state"], row["jobs"][0]["nodes"]) == ("pending", "PENDING", [])
    site.run("status").expect(0, "waiting", "pending", "Resources")
    site.run("dashboard", "waiting").expect(1, "no head yet")
    command.interrupt()
    command.ended().expect(130, "interrupted")
    assert len(site.jobs()) == 1  # the one that fills the queue
    assert not list(site.state.glob("clusters/*/token"))

    site.run("up", "--name", "waiting", "--nodes", 2, "--no-wait").expect(0, "submitted", "raylaunch status")
    assert site.cluster_status("waiting")["state"] == "pending"
    site.run("up", "--name", "waiting").expect(2, "already running", "PENDING")
    site.run("down").expect(0, "waiting is down")
    assert len(site.jobs()) == 1
    site.run("down", "waiting").expect(0, "down already")


def test_interrupted_while_booting(site: Site) -> None:
    config = site.state / "home" / "booting.yaml"
    config.write_text("slurm: {setup: ['[ $SLURMD_NODENAME != node2 ] || sleep 1000']}\n")
    command = site.start("up", "--name", "booting", "--nodes", 2, "-c", config)
    command.wait_said("the head starts on node1")
    command.interrupt()
    command.ended().expect(130, "interrupted")
    site.wait_clean()
    assert site.cluster_status("booting")["state"] == "down"


def test_a_limit_on_the_bring_up(site: Site) -> None:
    done = site.run("up", "--name", "slow", "--nodes", 2, "--timeout", 0.5)
    done.expect(1, "of at least 2 nodes within 0.5 s", "node1", "node2", "--timeout")
    site.wait_clean()


@pytest.mark.long
def test_no_wait_comes_up_by_itself(site: Site, cluster: Callable[..., Done]) -> None:
    done = cluster("later", "--nodes", 1, "--no-wait").expect(0)
    assert done.out == ""
    wait_for("ready", lambda: site.cluster_status("later")["state"] == "ready", LIMIT)


# --- the script -------------------------------------------------------------------------------------


def test_the_script_is_what_is_submitted(site: Site) -> None:
    config = site.state / "home" / "script.yaml"
    config.write_text(
        "slurm:\n"
        '  env: {KEY: "${OUR_SECRET}", PLAIN: "it\'s $HOME"}\n'
        "  setup: ['echo \"hello\"']\n  comment: two words\n  time: 1:30:00\n  exclude: node4\n"
    )
    options = ["-c", config, "--name", "shown", "--nodes", "2:3", "--mem", "2G"]
    options += ["--", "--dependency", "singleton", "--hold"]
    env = {"OUR_SECRET": SECRET}
    shown = site.run("up", "--dry-run", *options, env=env).expect(0)
    assert site.run("script", *options, env=env).expect(0).out == shown.out
    assert shown.err == "" and SECRET not in shown.out
    assert not site.cluster("shown").exists() and not site.jobs()
    lines = shown.out.splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in (
        "--no-kill",
        "--nodes=2-3",
        "--mem=2G",
        '--comment="raylaunch cluster=shown life=CANARY; two words"',
        "--dependency singleton",
    ):
        assert f"#SBATCH {line}" in lines
    assert any(re.fullmatch(r"#SBATCH --signal=B:USR1@\d+", line) for line in lines)
    assert subprocess.run(["bash", "-n"], input=shown.out, text=True, check=False).returncode == 0
    subprocess.run(["sbatch", "--test-only"], input=shown.out, text=True, env=site.env, check=True)

    site.run("up", "--no-wait", *options, env=env).expect(0)
    try:
        submitted = site.cluster("shown") / "script.sbatch"
        job = site.jobs()[0].split()[0]
        at_slurm = site.state / "home" / "at-slurm"
        site.slurm("scontrol", "write", "batch_script", job, str(at_slurm))
        canary = files.read_json(site.cluster("shown") / "cluster.json")["canary"]
        for text in (submitted.read_text(), at_slurm.read_text()):
            assert text.rstrip("\0") == re.sub(r"(CANARY|life)=CANARY", rf"\1={canary}", shown.out)
    finally:
        site.run("down", "shown").expect(0)
    site.wait_clean()


def test_two_at_once(site: Site) -> None:
    """Of one name: one comes up, the other is refused; never half of each."""
    commands = [site.start("up", "--name", "race", "--nodes", 1, "--no-wait", "--", "--hold") for _ in range(2)]
    done = sorted((command.ended() for command in commands), key=lambda one: one.code)
    assert [one.code for one in done] == [0, 2] and "race" in done[1].err, [str(one) for one in done]
    assert len(site.jobs()) == 1
    site.run("down", "race").expect(0)
    site.wait_clean()


def test_down_all(site: Site) -> None:
    for name in ("one", "two"):
        site.run("up", "--name", name, "--nodes", 1, "--no-wait", "--", "--hold").expect(0)
    assert {row["name"] for row in site.status()["clusters"] if row["state"] != "down"} == {"one", "two"}
    site.run("down").expect(2, "one", "two", "--all")
    site.run("down", "one", "--all").expect(2)
    site.run("dashboard").expect(2, "one", "two")
    done = site.run("down", "--all").expect(0)
    assert "cluster one is down" in done.out and "cluster two is down" in done.out
    site.wait_clean()
