"""The Slurm client: exact commands, and what becomes of Slurm's own words (captured from 22.05.8)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import pytest

from raylaunch.errors import SlurmError, SlurmUnavailable
from raylaunch.scheduler.slurm import client, parse
from raylaunch.scheduler.slurm.client import Completed, Slurm
from raylaunch.scheduler.slurm.environment import clean_env
from raylaunch.scheduler.slurm.rows import JobState

DATA = Path(__file__).parent / "data"
SEP = parse.SEPARATOR
SCRIPT = "#!/bin/bash\n#SBATCH --job-name=x\n#SBATCH --time=10\nsleep 1\n"
Answer = Completed | Exception


class Fake:
    """A runner that answers by the command's name and remembers what it was asked."""

    def __init__(self, **answers: Answer) -> None:
        self.answers = answers
        self.commands: list[list[str]] = []
        self.stdin: str | None = None
        self.env: Mapping[str, str] = {}
        self.timeout = 0.0

    def __call__(self, command: Sequence[str], timeout: float, stdin: str | None, env: Mapping[str, str]) -> Completed:
        self.commands.append(list(command))
        if len(self.commands) == 1:
            self.timeout, self.stdin, self.env = timeout, stdin, env
        answer = self.answers[command[0]]
        if isinstance(answer, Exception):
            raise answer
        return answer


def refused(stderr: str, code: int = 1) -> Completed:
    return Completed(code, "", stderr)


SINFO = Completed(0, (DATA / "sinfo.txt").read_text())
SQUEUE = Completed(0, (DATA / "squeue.txt").read_text())


def test_submit() -> None:
    fake = Fake(sbatch=Completed(0, "42\n"))
    assert Slurm(fake).submit(SCRIPT, ["--exclude=node1"], env={"HOME": "/h", "SLURM_JOB_ID": "7"}) == "42"
    assert fake.commands == [["sbatch", "--parsable", "--exclude=node1"]]
    assert fake.stdin == SCRIPT and fake.timeout == 10
    assert fake.env == {"HOME": "/h"}


REFUSALS = [
    (
        "sbatch: error: invalid partition specified: nope\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
        "Set slurm.partition to one of: main (default), low, small, down.",
    ),
    (
        "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified\n",
        "slurm.account",
    ),
    ("sbatch: error: Batch job submission failed: Invalid qos specification\n", "slurm.qos"),
    (
        "sbatch: error: Batch job submission failed: Requested node configuration is not available\n",
        "Available: main (default): 4 nodes with 4 CPUs, 24105 MiB, gpu:2, up to 1 day; low: 4",
    ),
    ("sbatch: error: Invalid generic resource (gres) specification\n", "slurm.gres. Available: main"),
    ("sbatch: error: Memory specification can not be satisfied\n", "Lower slurm.mem"),
    (
        "sbatch: error: Batch job submission failed: More processors requested than permitted\n",
        "cpus_per_task",
    ),
    ("sbatch: error: Batch job submission failed: Node count specification invalid\n", "slurm.nodes"),
    (
        "sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)\n",
        "small: 1 node with 4 CPUs, 24105 MiB, gpu:2, up to 0:10:00",
    ),
    ("sbatch: error: Batch job submission failed: Invalid feature specification\n", "slurm.constraint"),
    ("sbatch: error: Batch job submission failed: Invalid node name specified\n", "slurm.nodelist"),
    ("sbatch: error: Batch job submission failed: Requested reservation is invalid\n", "slurm.reservation"),
    ("sbatch: unrecognized option '--bogus'\nTry \"sbatch --help\" for more information\n", "slurm.extra"),
    ("sbatch: error: Invalid --time specification\n", "slurm.time"),
    ("sbatch: error: something that no one has seen before\n", "sbatch(1)"),
]


@pytest.mark.parametrize(("stderr", "hint"), REFUSALS)
def test_refused_submission(stderr: str, hint: str) -> None:
    fake = Fake(sbatch=refused(stderr), sinfo=SINFO)
    with pytest.raises(SlurmError) as caught:
        Slurm(fake).submit(SCRIPT, ["-p", "a b"], env={})
    assert not isinstance(caught.value, SlurmUnavailable)
    assert caught.value.message.startswith("`sbatch --parsable -p 'a b'` failed (exit 1)\n")
    assert all(line in caught.value.message for line in stderr.splitlines())
    assert hint in caught.value.hint
    assert "{" not in caught.value.hint


def test_refusal_when_sinfo_fails_too() -> None:
    with pytest.raises(SlurmError) as caught:
        Slurm(Fake(sbatch=refused(REFUSALS[0][0]), sinfo=refused("broken"))).submit(SCRIPT)
    assert caught.value.hint == "Set slurm.partition to one of: see `sinfo`."


UNREACHABLE = [
    ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", "scontrol ping"),
    ("slurm_load_jobs error: Socket timed out on send/recv operation\n", "scontrol ping"),
    (
        'squeue: error: Munge encode failed: Failed to access "/run/munge/munge.socket": No such file or '
        "directory (Did you start munged?)\nslurm_load_jobs error: Protocol authentication error\n",
        "Munge",
    ),
    ("squeue: fatal: Could not establish a configuration source\n", "SLURM_CONF"),
]


@pytest.mark.parametrize(("stderr", "hint"), UNREACHABLE)
@pytest.mark.parametrize("command", ["squeue", "sbatch", "sinfo", "sacct", "scancel"])
def test_unreachable(command: str, stderr: str, hint: str) -> None:
    slurm = Slurm(Fake(**{command: refused(stderr)}))
    ask: dict[str, Callable[[], object]] = {
        "squeue": lambda: slurm.jobs(["1"]),
        "sbatch": lambda: slurm.submit(SCRIPT),
        "sinfo": slurm.partitions,
        "sacct": lambda: slurm.finished(["1"]),
        "scancel": lambda: slurm.cancel(["1"]),
    }
    with pytest.raises(SlurmUnavailable) as caught:
        ask[command]()
    assert stderr.splitlines()[-1] in caught.value.message and hint in caught.value.hint


def test_too_slow() -> None:
    late = subprocess.TimeoutExpired(["squeue"], 10, stderr=b"squeue: error: s_p_parse_file: cannot stat file /x\n")
    with pytest.raises(SlurmUnavailable, match=r"`squeue .* -j 1` did not answer within 10 s\n.*cannot stat") as caught:
        Slurm(Fake(squeue=late)).jobs(["1"])
    assert "SLURM_CONF" in caught.value.hint


def test_a_submission_that_is_too_slow_may_have_happened() -> None:
    with pytest.raises(SlurmUnavailable) as caught:
        Slurm(Fake(sbatch=subprocess.TimeoutExpired(["sbatch"], 10))).submit(SCRIPT)
    assert "may be queued all the same" in caught.value.hint


def test_missing_command() -> None:
    missing = FileNotFoundError(2, "No such file or directory")
    with pytest.raises(SlurmUnavailable, match="`squeue` cannot be run") as caught:
        Slurm(Fake(squeue=missing)).jobs(["1"])
    assert "cluster.backend" in caught.value.hint


def test_available() -> None:
    fake = Fake(sbatch=Completed(0, "slurm-wlm 22.05.8\n"))
    assert Slurm(fake).available() and fake.commands == [["sbatch", "--version"]]
    assert not Slurm(Fake(sbatch=FileNotFoundError(2, "No such file"))).available()
    assert not Slurm(Fake(sbatch=refused("sbatch: fatal: Could not establish a configuration source\n"))).available()
    with pytest.raises(SlurmUnavailable):  # SLURM_CONF names a file that is not there: not "no Slurm"
        Slurm(Fake(sbatch=subprocess.TimeoutExpired(["sbatch"], 10))).available()


def test_jobs_is_one_call_for_all() -> None:
    fake = Fake(squeue=SQUEUE)
    rows = Slurm(fake).jobs(["24", "25"])
    assert fake.commands == [["squeue", "-h", "-t", "all", "-o", parse.JOB_FORMAT, "-j", "24,25"]]
    assert rows["24"].state is JobState.RUNNING and rows["25"].state is JobState.COMPLETED


def test_no_ids_no_call() -> None:
    slurm = Slurm(Fake())
    assert slurm.jobs([]) == {} and slurm.finished([]) == {}
    slurm.cancel([])


def test_unknown_job() -> None:
    gone = refused("slurm_load_jobs error: Invalid job id specified\n")
    assert Slurm(Fake(squeue=gone)).jobs(["99999"]) == {}
    with pytest.raises(SlurmError, match="Invalid job id: abc"):
        Slurm(Fake(squeue=refused("squeue: error: Invalid job id: abc\n"))).jobs(["abc"])


def test_usage() -> None:
    row = SEP.join(
        ["9.0", "RUNNING", "60", "8", "2", "1-00:00:01.500", "2.50G", "0", "cpu=8,mem=16G,node=2,gres/gpu=4"]
    )
    fake = Fake(sacct=Completed(0, f"{row}\n"))
    (found,) = Slurm(fake).usage(["9", "10"], datetime(2026, 11, 21, 1, 2, 3)) or []
    assert fake.commands == [
        ["sacct", "-D", "-n", "-P", f"--delimiter={SEP}", "-o", parse.USAGE_FORMAT, "-S", "2026-11-21T01:02:03", "-j", "9,10"]
    ]  # fmt: skip
    assert (found.job, found.step, found.state, found.gpus, found.gpu_type) == ("9", "0", JobState.RUNNING, 4, "")
    assert (
        found.cpu_seconds == 86401.5 and found.max_rss == 5 << 29 and found.memory == 16 << 30 and found.joules is None
    )
    assert Slurm(Fake(sacct=refused("Slurm accounting storage is disabled\n"))).usage(["9"], datetime.now()) is None
    assert Slurm(Fake()).usage([], datetime.now()) == []
    with pytest.raises(SlurmError):
        Slurm(Fake(sacct=Completed(0, "what\n"))).usage(["9"], datetime.now())


def test_finished() -> None:
    fake = Fake(sacct=Completed(0, (DATA / "sacct.txt").read_text()))
    rows = Slurm(fake).finished(["9", "10"])
    assert rows is not None and rows["9"].exit_code == 3
    assert fake.commands[0] == [
        *("sacct", "-X", "-n", "-P", f"--delimiter={SEP}"),
        *("-o", "JobID,State,ExitCode,NodeList,Reason", "-j", "9,10"),
    ]
    assert Slurm(Fake(sacct=refused("Slurm accounting storage is disabled\n"))).finished(["9"]) is None


def test_cancel() -> None:
    fake = Fake(scancel=Completed(0))
    Slurm(fake).cancel(["1", "2"])
    Slurm(fake).cancel(["1"], "USR1")
    assert fake.commands == [["scancel", "1", "2"], ["scancel", "--signal=USR1", "--batch", "1"]]


def test_cancel_of_what_has_ended_is_no_error() -> None:
    gone = "scancel: error: Kill job error on job id 25: Invalid job id specified\n"
    Slurm(Fake(scancel=refused(gone))).cancel(["25", "24"], "USR1")
    denied = "scancel: error: Kill job error on job id 37: Access/permission denied\n"
    with pytest.raises(SlurmError, match="permission denied") as caught:
        Slurm(Fake(scancel=refused(gone + denied, 210))).cancel(["25", "37"])
    assert "not yours" in caught.value.hint
    with pytest.raises(SlurmError, match="it said nothing"):
        Slurm(Fake(scancel=refused("", 1))).cancel(["25"])


def test_partitions() -> None:
    fake = Fake(sinfo=SINFO, squeue=SQUEUE)
    assert Slurm(fake).partitions()[0].name == "main"
    assert fake.commands == [["sinfo", "-h", "-o", parse.PARTITION_FORMAT]]


def test_summary_is_short() -> None:
    line = SEP.join(["p{}", "up", "infinite", "1", "idle", "1", "1", "(null)"]) + "\n"
    rows = parse.parse_partitions("".join(line.format(i) for i in range(50)))
    assert client.summary(rows).endswith("p7: 1 node with 1 CPUs, 1 MiB; and 42 more in `sinfo`")


def test_clean_env_takes_out_what_changes_the_answer() -> None:
    kept = {"HOME": "/h", "SLURM_CONF": "/c", "SLURM_JWT": "t", "MY_SLURM_X": "1"}
    out = {
        **{
            "SLURM_JOB_ID": "1",
            "SLURM_MEM_PER_NODE": "1",
            "SLURM_TIME_FORMAT": "relative",
            "SLURM_CLUSTERS": "x",
        },
        **{"SQUEUE_USERS": "nobody", "SINFO_FORMAT": "%n", "SACCT_FORMAT": "x", "SCANCEL_INTERACTIVE": "1"},
        **{"SBATCH_EXPORT": "NONE", "SBATCH_WAIT": "1", "SBATCH_ARRAY_INX": "1-9"},
    }
    assert clean_env({**kept, **out}) == kept


@pytest.mark.parametrize(
    ("variable", "line", "stays"),
    [
        ("SBATCH_PARTITION", "--partition=a", False),
        ("SBATCH_PARTITION", "-p a", False),
        ("SBATCH_PARTITION", "--time=5", True),
        ("SBATCH_TIMELIMIT", "--time=5", False),
        ("SBATCH_MEM_PER_NODE", "--mem=5", False),
        ("SBATCH_ACCOUNT", "--time=5", True),
        ("SBATCH_REQUEUE", "--no-requeue", False),
        ("SBATCH_GPUS_PER_NODE", "--gpus-per-node=2", False),
    ],
)
def test_a_variable_never_beats_the_script(variable: str, line: str, stays: bool) -> None:
    assert (variable in clean_env({variable: "x"}, f"#!/bin/bash\n#SBATCH {line}\n")) is stays
    assert (variable in clean_env({variable: "x"}, "", line.split())) is stays


def test_real_runner() -> None:
    code = "import os, sys; print(sys.stdin.read() + os.environ['X']); print('é', file=sys.stderr); sys.exit(3)"
    done = client.run([sys.executable, "-S", "-c", code], 30, "in ", {"X": "ü", "PYTHONUTF8": "1"})
    assert done == Completed(3, "in ü\n", "é\n")
    with pytest.raises(subprocess.TimeoutExpired):
        client.run(["sleep", "10"], 0.05, None, {"PATH": "/bin:/usr/bin"})
    with pytest.raises(FileNotFoundError):
        client.run(["raylaunch-no-such-command"], 1, None, {})


def test_jobs_by_name() -> None:
    fake = Fake(squeue=SQUEUE)
    assert list(Slurm(fake).named(["raylaunch-main", "raylaunch-main-join"])) == ["16"]
    assert fake.commands[0][-2:] == ["--me", "--name=raylaunch-main,raylaunch-main-join"]
    assert Slurm(fake).named(["we|ird,ü"]).keys() == {"5", "28"} and fake.commands[1][-1] == "--me"


def test_nodes() -> None:
    fake = Fake(sinfo=Completed(0, (DATA / "nodes.txt").read_text()))
    assert [row.drains for row in Slurm(fake).nodes().values()] == [False, False, True, False]
    assert fake.commands == [["sinfo", "-h", "-N", "-o", parse.NODE_FORMAT]]


def test_requeue_and_updates() -> None:
    fake = Fake(scontrol=Completed(0))
    slurm = Slurm(fake)
    slurm.requeue("7")
    slurm.start_now("7")
    slurm.keep_off("8", ["n1", "n2"])
    assert [" ".join(c) for c in fake.commands] == [
        "scontrol requeue 7", "scontrol update jobid=7 StartTime=now", "scontrol update jobid=8 ExcNodeList=n1,n2",
    ]  # fmt: skip
    with pytest.raises(SlurmError, match="requeue 7"):
        Slurm(Fake(scontrol=refused("Requested operation is presently disabled for job 7"))).requeue("7")


def test_what_a_site_is_like() -> None:
    fake = Fake(scontrol=Completed(0, (DATA / "scontrol-config.txt").read_text()), sacctmgr=Completed(0, "phys||normal|\n"),
                sshare=Completed(0, "phys|0.250000\n"), srun=Completed(0, "  --container-image=…\n"))  # fmt: skip
    slurm = Slurm(fake)
    assert slurm.settings()["SchedulerType"] == "sched/backfill"
    rows = slurm.associations("me")
    assert (
        rows is not None and rows[0].account == "phys" and slurm.shares() == {"phys": 0.25} and slurm.has_containers()
    )
    assert [" ".join(c) for c in fake.commands] == [
        "scontrol show config",
        "sacctmgr -n -P show associations user=me format=Account,Partition,QOS,DefaultQOS",
        "sshare -U -n -P -o Account,FairShare",
        "srun --help",
    ]


def test_a_site_without_accounting() -> None:
    words = (
        "You are not running a supported accounting_storage plugin\nOnly 'accounting_storage/slurmdbd' is supported.\n"
    )
    assert Slurm(Fake(sacctmgr=refused(words))).associations("me") is None
    with pytest.raises(SlurmError, match="something else"):
        Slurm(Fake(sacctmgr=refused("something else"))).associations("me")
    with pytest.raises(SlurmUnavailable):
        Slurm(Fake(sacctmgr=refused("sacctmgr: error: Connection refused"))).associations("me")


def test_a_tested_script_says_when_it_would_start() -> None:
    words = "sbatch: Job 2 to start at 2026-11-22T02:23:53 using 2 processors on nodes node[1-2] in partition main\n"
    fake = Fake(sbatch=Completed(0, "", words))
    assert Slurm(fake).check(SCRIPT) == words and fake.commands == [["sbatch", "--test-only"]] and fake.stdin == SCRIPT
