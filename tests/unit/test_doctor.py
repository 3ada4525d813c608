"""The doctor's judgement: pairs and who is slow, what facts of machines, sites and fleets mean, and how it is told."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylaunch.cli.doctor import report
from raylaunch.cluster.agent import self_check
from raylaunch.config.schema import SlurmConfig
from raylaunch.errors import BringUpError
from raylaunch.host.ports import lease_ports
from raylaunch.scheduler.slurm import parse, site
from raylaunch.text import size
from raylaunch.tools.doctor import (
    clock_server,
    compare_nodes,
    gpu_status,
    machine_checks,
    machine_facts,
    mailbox,
    pairwise,
    slurm_checks,
    storage_check,
)
from raylaunch.tools.doctor.finding import Finding, failed, ok, problem, unknown, warning
from raylaunch.tools.doctor.gpu_status import GpuStatus, Smi
from raylaunch.tools.doctor.machine_facts import Interface, MachineFacts, Port
from raylaunch.tools.doctor.mailbox import Checked, GpuCheck, Hello, PairResult, Pairs, Peer, Reached

DATA = Path(__file__).parent / "data"
GIB = 1 << 30


def by_check(findings: Iterable[Finding]) -> dict[str, Finding]:
    """Check → its worst finding."""
    rank = ["ok", "unknown", "warning", "problem"]
    return {one.check: one for one in sorted(findings, key=lambda one: rank.index(one.status))}


# --- pairs ---------------------------------------------------------------------------------------


@given(st.integers(0, 70), st.integers(1, 12))
def test_rounds_are_disjoint_and_no_pair_meets_twice(nodes: int, most: int) -> None:
    schedule = pairwise.rounds(nodes, most)
    assert len(schedule) <= most
    for one in schedule:
        seen = [node for pair in one for node in pair]
        assert len(seen) == len(set(seen)) and all(0 <= a < b < nodes for a, b in one)
    met = [pair for one in schedule for pair in one]
    assert len(met) == len(set(met))
    if most >= 4:  # an odd one out pauses once
        for node in range(nodes):
            assert sum(p is not None for p in pairwise.partners(node, schedule)) >= min(3, nodes - 1)


def matrix(nodes: int, speeds: dict[int, float], noise: float = 0.1) -> dict[tuple[str, str], float | None]:
    """Measurements of a network in which a pair is as quick as its slower end."""
    dice = random.Random(nodes)
    return {
        (f"n{a}", f"n{b}"): min(speeds.get(a, 10e9), speeds.get(b, 10e9)) * dice.uniform(1 - noise, 1)
        for one in pairwise.rounds(nodes)
        for a, b in one
    }


@pytest.mark.parametrize("nodes", [3, 4, 5, 8, 33, 512])
def test_the_slow_node_is_named_and_nobody_else(nodes: int) -> None:
    seen = pairwise.analyse(matrix(nodes, {2: 4e9}))
    assert list(seen.slow) == ["n2"] and seen.slow["n2"] <= 4e9
    assert seen.usual > 8e9 and not seen.dead and not seen.paths


def test_several_slow_ones_and_none() -> None:
    assert set(pairwise.analyse(matrix(4, {0: 3e9, 3: 5e9})).slow) == {"n0", "n3"}
    assert set(pairwise.analyse(matrix(64, dict.fromkeys(range(0, 64, 9), 2e9))).slow) == {
        f"n{i}" for i in range(0, 64, 9)
    }
    for nodes in (2, 3, 7, 64):
        assert not pairwise.analyse(matrix(nodes, {}, noise=0.2)).slow


def test_of_two_nodes_nobody_is_slow() -> None:
    assert pairwise.analyse({("a", "b"): 1.0}).slow == {}


def test_a_path_and_a_dead_node() -> None:
    found = matrix(8, {})
    found["n0", "n4"] = 1e9
    found |= {pair: None for pair in found if "n7" in pair}
    seen = pairwise.analyse(found)
    assert seen.dead == ("n7",) and not seen.slow and list(seen.paths) == [("n0", "n4")]
    nothing = pairwise.analyse({("a", "b"): None})
    assert not nothing.own and not nothing.dead and not nothing.paths


# --- storage -------------------------------------------------------------------------------------

MOUNTS = r"""
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:50 / /home rw shared:1 - nfs4 filer:/home rw,vers=4.2
31 22 0:51 / /scratch\040fast rw - lustre 10.0.0.1@o2ib:/fs rw
32 30 0:52 / /home/me/ram rw - tmpfs tmpfs rw
33 32 0:53 / /home/me/ram rw - xfs /dev/sdb rw
torn line
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/etc", "ext4"),
        ("/home/you", "nfs4"),
        ("/homes", "ext4"),
        ("/scratch fast/x", "lustre"),
        ("/home/me/ram", "xfs"),
    ],
)
def test_the_file_system_of_a_path(path: str, kind: str) -> None:
    assert storage_check.file_system(path, MOUNTS)[0] == kind


def test_quota() -> None:
    text = "Disk quotas for user me (uid 1000):\n Filesystem blocks quota limit grace files quota limit grace\n"
    text += "filer:/home 900* 1000 2000 0 5 0 0 0\n"
    assert storage_check.parse_quota(text, "filer:/home") == storage_check.Quota(used=900 << 10, limit=2000 << 10)
    assert storage_check.parse_quota("/scratch\n  10 5 0 - 7 0 0 -\n", None) == storage_check.Quota(
        used=10 << 10, limit=5 << 10
    )
    assert storage_check.parse_quota("quota: none", "filer:/home") is None is storage_check.parse_quota("", None)


def a_storage(**changes: object) -> storage_check.Storage:
    usual = {"path": "/home/me/.raylaunch", "at": "/home/me", "type": "nfs4", "source": "filer:/home", "free": 900 * GIB,
             "total": 1000 * GIB, "speed": 500e6, "small": 0.002}  # fmt: skip
    return storage_check.Storage.model_validate(usual | changes)


def test_a_state_directory_as_it_should_be() -> None:
    assert {one.status for one in storage_check.judge(a_storage(), shared=True)} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "check", "status"),
    [
        ({"type": "tmpfs"}, "storage.type", "warning"),
        ({"at": "/tmp/x"}, "storage.type", "warning"),
        ({"type": "zzfs"}, "storage.type", "unknown"),
        ({"free": GIB // 2}, "storage.free", "problem"),
        ({"free": 10 * GIB}, "storage.free", "warning"),
        ({"quota": {"used": 99 * GIB, "limit": 100 * GIB}}, "storage.free", "warning"),
        ({"files_free": 12}, "storage.free", "warning"),
        ({"small": 0.5}, "storage.speed", "warning"),
        ({"error": "Read-only file system"}, "storage.path", "problem"),
    ],
)
def test_a_state_directory_that_is_not_well(changes: dict[str, object], check: str, status: str) -> None:
    found = by_check(storage_check.judge(a_storage(**changes), shared=True))[check]
    assert found.status == status and found.hint


def test_measuring_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_check, "CHUNKS", 1)
    found = storage_check.measure(tmp_path / "not" / "there")
    assert found.at == str(tmp_path) and found.speed and found.small and not found.error and found.free and found.type
    assert list(tmp_path.iterdir()) == []
    assert storage_check.measure(tmp_path / "x").type == storage_check.here(tmp_path)[0]


def test_a_file_system_that_hangs_is_given_up(tmp_path: Path) -> None:
    assert "no answer within 0.001 s" in storage_check.check(tmp_path, limit=0.001).error


# --- GPUs ----------------------------------------------------------------------------------------

SMI = """<?xml version="1.0" ?><!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd"><nvidia_smi_log>
<driver_version>550.54.15</driver_version><cuda_version>12.4</cuda_version><attached_gpus>2</attached_gpus>
<gpu id="00000000:19:00.0"><product_name>NVIDIA H100 80GB HBM3</product_name><uuid>GPU-aaaa</uuid>
 <pci><pci_gpu_link_info><link_widths><max_link_width>16x</max_link_width><current_link_width>16x</current_link_width>
 </link_widths></pci_gpu_link_info></pci>
 <clocks_event_reasons><clocks_event_reason_sw_power_cap>Active</clocks_event_reason_sw_power_cap>
 <clocks_event_reason_hw_thermal_slowdown>Not Active</clocks_event_reason_hw_thermal_slowdown></clocks_event_reasons>
 <fb_memory_usage><total>81559 MiB</total><used>4 MiB</used></fb_memory_usage>
 <ecc_errors><volatile><sram_correctable>3</sram_correctable><sram_uncorrectable_parity>0</sram_uncorrectable_parity>
 <dram_uncorrectable>0</dram_uncorrectable></volatile><aggregate><dram_uncorrectable>9</dram_uncorrectable></aggregate>
 </ecc_errors><remapped_rows><remapped_row_pending>No</remapped_row_pending></remapped_rows>
 <temperature><gpu_temp>31 C</gpu_temp></temperature></gpu>
<gpu id="00000000:3B:00.0"><product_name>NVIDIA H100 80GB HBM3</product_name><uuid>GPU-bbbb</uuid>
 <pci><pci_gpu_link_info><link_widths><max_link_width>16x</max_link_width><current_link_width>8x</current_link_width>
 </link_widths></pci_gpu_link_info></pci>
 <clocks_throttle_reasons><clocks_throttle_reason_hw_thermal_slowdown>Active</clocks_throttle_reason_hw_thermal_slowdown>
 </clocks_throttle_reasons>
 <ecc_errors><volatile><double_bit><total>1</total></double_bit><dram_uncorrectable>2</dram_uncorrectable></volatile>
 </ecc_errors><remapped_rows><remapped_row_pending>Yes</remapped_row_pending></remapped_rows>
 <gpu_recovery_action>Reset</gpu_recovery_action><temperature><gpu_temp>91 C</gpu_temp></temperature></gpu>
</nvidia_smi_log>"""


def test_nvidia_smi() -> None:
    found = gpu_status.parse(SMI)
    assert (found.driver, found.cuda, len(found.gpus), found.error) == ("550.54.15", "12.4", 2, "")
    well, sick = found.gpus
    assert well == GpuStatus(
        index=0, uuid="GPU-aaaa", name="NVIDIA H100 80GB HBM3", memory=81559 << 20, used=4 << 20, temperature=31
    )
    assert (sick.ecc, sick.slowed, sick.link) == (3, ("hw_thermal_slowdown",), "8x of 16x")
    assert sick.sick == ("remapped_row_pending", "recovery action: Reset")
    assert not list(machine_checks.gpus([well]))
    said = by_check(machine_checks.gpus([sick]))
    assert said["gpu.health"].status == "problem" and "3 uncorrectable" in said["gpu.health"].text
    assert {"gpu.throttling", "gpu.link"} <= said.keys()
    assert gpu_status.ours(found.gpus, ["1"]) == [sick] and gpu_status.ours(found.gpus, ["GPU-aa"]) == [well]
    assert len(gpu_status.ours(found.gpus, ["MIG-1"])) == 2


@pytest.mark.parametrize("text", ["", "No devices were found", SMI[:400], "\x00\x01"])
def test_nvidia_smi_that_says_something_else(text: str) -> None:
    assert gpu_status.parse(text).error.startswith("nvidia-smi printed invalid XML")


@pytest.fixture
def smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file for a shell script that stands for nvidia-smi."""
    command = tmp_path / "nvidia-smi"
    command.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return command


def test_asking_a_driver_that_works_fails_and_hangs(smi_says: Path) -> None:
    smi_says.write_text(f"#!/bin/sh\ncat <<'E'\n{SMI}\nE\n")
    assert len(gpu_status.ask().gpus) == 2 and asyncio.run(self_check.gpu_trouble()) == ""
    smi_says.write_text("#!/bin/sh\necho 'Unable to determine the device handle for GPU0: Unknown Error'; exit 255\n")
    assert "Unknown Error" in gpu_status.ask().error and "Unknown Error" in asyncio.run(self_check.gpu_trouble())
    smi_says.write_text("#!/bin/sh\nexec sleep 60\n")
    assert "did not answer within 0.05 s" in gpu_status.ask(0.05).error
    assert "did not end within 0.05 s" in asyncio.run(self_check.gpu_trouble(0.05))


def test_no_nvidia_smi_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert asyncio.run(self_check.gpu_trouble()) == "" and gpu_status.ask() == Smi()


# --- one machine ---------------------------------------------------------------------------------

IB = Port(
    device="mlx5_0", port=1, active=True, state="ACTIVE", rate="400 Gb/sec (4X NDR)", ethernet=False, interfaces=()
)


def a_machine(**changes: object) -> MachineFacts:
    usual = {"temp": "/tmp/rl-0-1", "temp_type": "ext4", "temp_free": 99 * GIB,
             "shm_free": 64 * GIB, "limits": {"nofile": (1024, 524288), "nproc": (None, None), "memlock": (None, None)},
             "synchronised": True, "modules": True, "python": "3.11.2", "prefix": "/shared/venv", "prefix_type": "nfs4",
             "versions": {"raylaunch": "1", "ray": "2.60.0", "torch": "2.9.0", "cuda": "12.8.90"},
             "interfaces": (Interface(name="eth0", address="10.0.0.1", speed=25000),)}  # fmt: skip
    return MachineFacts.model_validate(usual | changes)


def test_a_machine_as_it_should_be() -> None:
    found = [*machine_checks.judge(a_machine()), *machine_checks.network(a_machine(), None)]
    found += machine_checks.software(a_machine(), gpu_status.parse(SMI), wants_gpus=True, shared=True)
    assert {one.status for one in found} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "check", "status"),
    [
        ({"temp_error": "the temp directory is too long"}, "node.temp", "problem"),
        ({"temp_type": "lustre"}, "node.temp", "warning"),
        ({"temp_free": 10 << 20}, "node.temp", "problem"),
        ({"shm_free": 64 << 20}, "node.shm", "warning"),
        ({"shm_free": 1 << 20}, "node.shm", "problem"),
        ({"limits": {"nofile": (256, 256), "nproc": (9, 9), "memlock": (0, 0)}}, "node.limits", "problem"),
        ({"limits": {"nofile": (9999, 9999), "nproc": (None, None), "memlock": (65536, 65536)}, "adapters": (IB,)},
         "node.limits", "warning"),
        ({"ports_error": "no block of 512 free ports"}, "node.ports", "problem"),
        ({"synchronised": False}, "node.clock", "warning"),
        ({"modules": False}, "node.tools", "problem"),
    ],
)  # fmt: skip
def test_a_machine_that_is_not_well(changes: dict[str, object], check: str, status: str) -> None:
    found = by_check(machine_checks.judge(a_machine(**changes), modules_wanted=True))[check]
    assert found.status == status and found.hint


def test_infiniband() -> None:
    dark = IB.model_copy(update={"device": "mlx5_1", "active": False, "state": "DOWN"})
    roce = IB.model_copy(update={"device": "mlx5_2", "ethernet": True, "rate": "100 Gb/sec (4X EDR)"})
    unused = roce.model_copy(update={"active": False})
    found = list(machine_checks.infiniband([IB, dark, roce, unused]))
    assert [one.status for one in found] == ["warning", "ok"] and "mlx5_1 (DOWN)" in found[0].text
    assert "NCCL uses mlx5_0 (InfiniBand, 400 Gb/s)" in found[1].text
    assert "mlx5_2 (RoCE" in next(machine_checks.infiniband([roce, unused])).text
    ib0 = Interface(name="ib0", address="10.1.0.1", infiniband=True)
    text = machine_checks.network(a_machine(interfaces=(*a_machine().interfaces, ib0)), None)[0].text
    assert "eth0 10.0.0.1 (25 Gb/s), ib0 10.1.0.1 (IPoIB)" in text and "cluster.interface=ib0" in text
    assert machine_checks.network(a_machine(), "ib9")[0].status == "warning"


def test_software_that_does_not_fit() -> None:
    def judged(smi: Smi = gpu_status.parse(SMI), **changes: object) -> dict[str, Finding]:  # noqa: B008
        return by_check(machine_checks.software(a_machine(**changes), smi, wants_gpus=True, shared=True))

    assert judged(versions={"raylaunch": "1"})["software.torch"].status == "problem"
    assert judged(versions={"torch": "2.9.0+cpu", "ray": "2"})["software.cuda"].status == "warning"
    assert judged(versions={"torch": "2.9.0", "ray": "2", "cuda": "13.0"})["software.driver"].status == "problem"
    assert judged(prefix_type="ext4")["software.shared"].status == "warning"
    assert judged(Smi(error="it hangs"))["software.driver"].status == "warning"
    assert judged(Smi())["software.driver"].status == "ok"


def test_facts_of_this_machine() -> None:
    found = machine_facts.gather("/tmp", "/state/clusters/x", {"LMOD_CMD": "/lmod"})
    assert found == MachineFacts.model_validate_json(found.model_dump_json())
    assert found.temp.startswith("/tmp/rl-") and found.modules and found.versions["ray"].startswith("2.")
    assert "too long" in machine_facts.gather("/tmp/" + "x" * 90, "k", {}).temp_error
    assert "is not writable" in machine_facts.gather("/nowhere", "k", {}).temp_error


# --- Slurm ---------------------------------------------------------------------------------------


def test_settings_of_a_real_slurm() -> None:
    found = site.parse_settings((DATA / "scontrol-config.txt").read_text())
    assert (found["SLURM_VERSION"], found["SlurmdTimeout"], found["JobRequeue"]) == ("22.05.8", "10 sec", "1")
    said = list(slurm_checks.settings(found, 20000))
    assert {one.status for one in said} == {"ok"} and said[0].text == "Slurm 22.05.8, cluster doc"


def test_settings_that_matter() -> None:
    usual = {"SLURM_VERSION": "22.05.8", "SlurmdTimeout": "300 sec", "MinJobAge": "300 sec", "JobRequeue": "1",
             "PreemptMode": "REQUEUE", "PreemptType": "preempt/partition_prio", "ProctrackType": "proctrack/cgroup",
             "MaxJobCount": "10000", "KillWait": "30 sec"}  # fmt: skip
    found = list(slurm_checks.settings(usual, 1024))
    assert {one.status for one in found} == {"ok"} and "preemption REQUEUE (partition_prio)" in found[2].text
    bad = {
        "SLURM_VERSION": "20.11.9",
        "SlurmdTimeout": "0 sec",
        "MinJobAge": "2 sec",
        "ProctrackType": "proctrack/linuxproc",
    }
    wrong = [one.check for one in slurm_checks.settings(usual | bad, 256) if one.status == "warning"]
    assert wrong == ["slurm.version", "slurm.limits", "slurm.limits", "slurm.processes", "slurm.propagation"]
    assert not any(one.status == "problem" for one in slurm_checks.settings({}, None))


def test_partitions() -> None:
    rows = parse.parse_partitions((DATA / "sinfo.txt").read_text())
    found = list(slurm_checks.partitions(rows, None))
    assert found[0].text.startswith("main (default): ") and "GPUs on idle nodes" in found[0].text and not failed(found)
    assert next(one for one in found if one.text.startswith("down")).text.endswith("does not accept jobs (down)")
    assert (
        failed(slurm_checks.partitions(rows, "down"))
        and "nope" in next(slurm_checks.partitions(rows, "main,nope")).text
    )
    assert failed(slurm_checks.partitions([], None))


def test_accounts() -> None:
    rows = site.parse_associations("phys||normal,high|normal\nBio|gpu|normal|\nshort|line\n")
    shares = site.parse_shares("  phys|0.250000\n bio|\n|1.0\nroot|0.000000\n")
    assert [row.account for row in rows] == ["phys", "Bio"] and shares == {"phys": 0.25}
    found = list(slurm_checks.accounts(rows, shares, SlurmConfig()))
    assert "phys (fair share 0.25), Bio" in found[0].text and not failed(found)
    assert [one.text for one in slurm_checks.accounts(rows, {}, SlurmConfig(account="PHYS"))][
        1
    ] == "QOS: normal, high; default normal"
    assert failed(slurm_checks.accounts(rows, {}, SlurmConfig(account="chem")))
    assert failed(slurm_checks.accounts(rows, {}, SlurmConfig(account="Bio", qos="high")))
    assert [one.status for one in slurm_checks.accounts(None, {}, SlurmConfig())] == ["ok"]
    assert [one.status for one in slurm_checks.accounts([], {}, SlurmConfig())] == ["warning"]


def test_estimate() -> None:
    words = "sbatch: Job 7 to start at 2026-11-22T03:00:00 using 8 processors on nodes node[1-2] in partition main"
    when, where = site.parse_estimate(words)
    assert when is not None and where == "node[1-2]"
    assert "estimated start: now, on node[1-2]" in slurm_checks.estimate("2", when, where, when).text
    assert "(in 5.0 h)" in slurm_checks.estimate("2", when, where, when - timedelta(hours=5)).text
    assert site.parse_estimate("?") == (None, "")
    assert "start time is unknown" in slurm_checks.estimate("1", None, "", datetime.now()).text


# --- many machines -------------------------------------------------------------------------------


def a_hello(index: int, **changes: object) -> Hello:
    usual = {"index": index, "node": f"n{index}", "address": f"10.0.0.{index}", "interface": "eth0", "port": 1, "store": 2,
             "time": 0.0, "facts": a_machine(), "cpus": 4, "memory": 8 * GIB, "object_store": GIB, "gpus": ()}  # fmt: skip
    return Hello.model_validate(usual | changes)


def names(count: int) -> dict[int, str]:
    return {index: f"n{index}" for index in range(count)}


def test_who_said_hello() -> None:
    found = {0: a_hello(0), 1: a_hello(1, error="no address")}
    said = list(compare_nodes.arrived(found, ["n0", "n1", "n2", "n3"], {"n2": "the state directory is not shared: x"}))
    assert {(one.check, one.status, one.node) for one in said} == {
        ("nodes.shared", "ok", None), ("nodes.start", "problem", "n1"), ("nodes.shared", "problem", "n2"),
        ("nodes.start", "problem", "n3"),
    }  # fmt: skip


def test_the_state_directory_is_shared_with_one_node_and_with_two() -> None:
    for count, words in ((1, "shared with 1 node"), (2, "shared with 2 nodes")):
        (said,) = compare_nodes.arrived({i: a_hello(i) for i in range(count)}, [f"n{i}" for i in range(count)], {})
        assert said.text.endswith(words)


def test_what_the_nodes_have_proved_is_no_doubt_any_more() -> None:
    doubts = [warning("storage.type", "ext4: looks node-local", "?"), warning("storage.free", "1 GiB free", "?")]
    shared = ok("nodes.shared", "shared with 2 nodes")
    assert compare_nodes.proved([*doubts, shared]) == [doubts[1], shared]
    apart = problem("nodes.shared", "not shared", "?", "n2")
    assert (
        compare_nodes.proved([*doubts, shared, apart]) == [*doubts, shared, apart]
        and compare_nodes.proved(doubts) == doubts
    )


def test_nodes_that_are_alike_and_one_that_is_not() -> None:
    found = {index: a_hello(index) for index in range(5)}
    assert {one.status for one in compare_nodes.alike(found, False, 0)} == {"ok"}
    odd = a_machine(interfaces=(Interface(name="eth0", address="10.0.0.9", speed=1000),), shm_free=1,
                    versions={**a_machine().versions, "torch": "2.8.0"}, adapters=(IB,))  # fmt: skip
    found[3] = a_hello(3, facts=odd, gpus=("0",), submit="Access/permission denied")
    said = list(compare_nodes.alike(found, False, 2))
    wrong = {(one.check, one.status) for one in said if one.node == "n3" and one.status != "ok"}
    assert wrong == {
        ("nodes.shm", "problem"), ("network.speed", "warning"), ("software.versions", "warning"), ("gpu.count", "problem"),
        ("network.adapters", "warning"), ("nodes.submit", "warning"),
    }  # fmt: skip
    assert "torch 2.8.0; most nodes have 2.9.0" in {one.text for one in said}
    assert "OK on 4 nodes" in by_check(said)["nodes.ground"].text
    assert not list(compare_nodes.alike({}, False, 0))


def checks(ahead: dict[int, float]) -> dict[int, Checked]:
    """Each node compared with node 0, whose clock is so far ahead of theirs."""
    first = {0: Checked(index=0, time=0.0, reached={1: Reached(seconds=1e-4)})}
    return first | {
        i: Checked(index=i, time=0.0, reached={0: Reached(seconds=1e-4, ahead=a)}) for i, a in ahead.items()
    }


def test_clocks() -> None:
    assert [one.status for one in compare_nodes.clocks(checks({1: 0.001, 2: -0.002}), names(3))] == ["ok"]
    late = list(compare_nodes.clocks(checks({1: 0.0, 2: 7.0, 3: 0.01}), names(4)))
    assert [(one.node, one.status) for one in late] == [("n2", "problem")] and "7.0 s behind" in late[0].text
    first = list(compare_nodes.clocks(checks({1: 2.0, 2: 2.0, 3: 2.0}), names(4)))  # the first node is the wrong one
    assert [(one.node, one.status) for one in first] == [("n0", "warning")] and "ahead of" in first[0].text
    assert not list(compare_nodes.clocks({}, {}))


def test_the_login_nodes_clock() -> None:
    assert compare_nodes.login_clock(100.0, [100.2], {99.0: 99.4}).status == "ok"
    assert "behind" in compare_nodes.login_clock(100.0, [130.2], {129.0: 99.4}).text
    assert "ahead of" in compare_nodes.login_clock(100.0, [70.2], {69.0: 99.4}).text


def test_who_is_cut_off() -> None:
    edges = {(a, b): "" for a in range(5) for b in range(5) if a != b}
    assert compare_nodes.cut_off(edges) == ({}, {})
    cut = edges | {edge: "timed out" for edge in edges if 3 in edge}
    assert compare_nodes.cut_off(cut) == ({3: "timed out"}, {})
    assert compare_nodes.cut_off(edges | {(1, 2): "refused"}) == ({}, {(1, 2): "refused"})
    assert compare_nodes.cut_off({(0, 1): "x", (1, 0): "x"})[0] == {}  # of two, who?
    found = {
        i: Checked(index=i, time=0, reached={j: Reached(error=cut[i, j]) for j in range(5) if j != i}) for i in range(5)
    }
    said, bad, apart = compare_nodes.reachable(found, names(5))
    assert [(one.node, one.status) for one in said] == [("n3", "problem")] and bad == {3} and not apart
    found[2] = Checked(index=2, time=0, reached={1: Reached(error="refused")})
    assert compare_nodes.reachable(found, names(5))[2] == {(1, 2)}


def gpu_node(index: int, flops: float = 700e12, smi: str = SMI, **changes: object) -> tuple[Hello, Checked]:
    parsed = gpu_status.parse(smi.replace("GPU-aaaa", f"GPU-{index}"))
    check = GpuCheck.model_validate(
        {"local": 0, "name": "H100", "memory": 80 * GIB, "taken": GIB, "flops": flops} | changes
    )
    return a_hello(index, gpus=("0",)), Checked(index=index, time=0, reached={}, gpus=(check,), smi=parsed)


def judged_gpus(*nodes: tuple[Hello, Checked]) -> list[Finding]:
    return compare_nodes.gpu_checks({c.index: c for _, c in nodes}, {h.index: h for h, _ in nodes})


def test_gpus_of_nodes() -> None:
    assert {one.status for one in judged_gpus(*(gpu_node(i) for i in range(4)))} == {"ok"}
    said = judged_gpus(
        gpu_node(0), gpu_node(1), gpu_node(2, flops=400e12), gpu_node(3, error="CUDA error", flops=0.0),
        gpu_node(4, taken=40 * GIB),
    )  # fmt: skip
    wrong = {(one.check, one.status, one.node) for one in said if one.status != "ok"}
    assert wrong == {("gpu.speed", "warning", "n2"), ("gpu.check", "problem", "n3"), ("gpu.taken", "warning", "n4")}
    other = by_check(judged_gpus(gpu_node(0), gpu_node(1), gpu_node(2, name="A100")))["gpu.model"]
    assert (other.status, other.node, other.text) == ("warning", "n2", "1 A100; most nodes have 1 H100")


def test_one_gpu_on_two_nodes() -> None:
    hello, check = gpu_node(0)
    other = check.model_copy(update={"index": 1})
    said = by_check(judged_gpus((hello, check), (a_hello(1, gpus=("0",)), other)))
    assert said["gpu.unique"].status == "problem" and "n0, n1" in said["gpu.unique"].text


def test_bandwidth() -> None:
    def told(found: dict[tuple[str, str], float | None]) -> list[Finding]:
        results = [PairResult(a=int(a[1:]), b=int(b[1:]), rate=rate, error="" if rate else "timed out")
                   for (a, b), rate in found.items()]  # fmt: skip
        rows = {i: Pairs(index=i, results=tuple(r for r in results if i in (r.a, r.b))) for i in range(9)}
        return list(compare_nodes.bandwidth(rows, names(9), "nccl"))

    assert [one.status for one in told(matrix(8, {}))] == ["ok"]
    slow = told(matrix(8, {5: 2e9}))
    assert [(one.check, one.status, one.node) for one in slow[1:]] == [("bandwidth.slow", "problem", "n5")]
    assert told(matrix(8, {5: 6e9}))[1].status == "warning"
    assert not pairwise.analyse(matrix(8, {5: 6e9}), "gloo").slow  # a processor's doing, it may be
    assert [one.status for one in told({("n0", "n1"): None})] == ["problem"]
    broken = matrix(8, {}) | {("n0", "n4"): None}
    assert told(broken)[1].check == "bandwidth.paths" and "n0-n4 (timed out)" in told(broken)[1].text
    assert [one.status for one in compare_nodes.bandwidth({}, {}, "gloo")] == ["problem"]


# --- between nodes ---------------------------------------------------------------------------------


def test_asking_a_peer_for_the_time() -> None:
    lease = lease_ports()
    server = clock_server.serve("127.0.0.3", lease.ports.control, "secret")
    place = Peer(index=3, node="n3", address="127.0.0.3", port=lease.ports.control, store=1)
    try:
        found = clock_server.ask_all([place, place.model_copy(update={"index": 4, "port": lease.ports.gcs})], "secret")
        assert not found[3].error and abs(found[3].ahead) <= found[3].seconds  # the same clock, read on the way
        assert "refused" in found[4].error
        assert clock_server.ask(place, "wrong").error
    finally:
        server.shutdown()
        server.server_close()
        lease.close()


def test_files_that_are_no_answers(tmp_path: Path) -> None:
    for content in (b"", b"\x00\xff", b"{", b"[]", b'{"index": "x"}', b"NaN"):
        (tmp_path / "x").write_bytes(content)
        assert mailbox.read(tmp_path / "x", Checked) is None
    assert mailbox.read(tmp_path / "absent", Checked) is None
    mailbox.write(tmp_path / "x", Pairs(index=1))
    heard: list[object] = []
    found = mailbox.collect({1: tmp_path / "x", 2: tmp_path / "absent"}, Pairs, heard.append, lambda _: True)
    assert found == {1: Pairs(index=1)} and heard == [Pairs(index=1)]


# --- what `up` looks at ----------------------------------------------------------------------------


def test_the_quick_part() -> None:
    self_check.check_limits("here")  # this machine is well
    self_check.enough("n1", self_check.SHM_LEAST, self_check.FILES_LEAST)
    with pytest.raises(BringUpError, match=r"/dev/shm on n1 has only 1\.0 MiB"):
        self_check.enough("n1", 1 << 20, 9999)
    with pytest.raises(BringUpError, match="may open only 256 files"):
        self_check.enough("n1", GIB, 256)
    assert self_check.clock(4.9) == "" and "12 s behind" in self_check.clock(-12.2) and "ahead" in self_check.clock(6)


# --- the report ------------------------------------------------------------------------------------

FINDINGS = [
    ok("slurm.version", "Slurm 22.05.8, cluster hpc"),
    warning("storage.type", "file system: ext4 from /dev/vda: looks node-local, but all nodes must share it", "Choose another one, or prove it."),
    *(problem("nodes.shm", "/dev/shm has 1.0 MiB free", "Remove what dead jobs left there.", f"node{i}") for i in range(40)),
]  # fmt: skip


@pytest.mark.parametrize("width", [30, 40, 80])
def test_the_report_fits_the_terminal(width: int) -> None:
    text = click.unstyle(report(FINDINGS, width))
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert "node0, node1, node2, node3, node4, node5 and 34 more: /dev/shm" in words
    assert words.endswith("1 problem, 1 warning") and words.count("Remove what") == 1


def test_a_report_of_odd_words() -> None:
    text = report([problem("gpu.driver", "\x1b[31mnvidia\x00-smi\n said", ""), unknown("nodes.clock", "")], 40)
    assert "\x1b[31mnvidia" not in text and "\x00" not in text and text.endswith("1 problem, 1 unknown")
    assert report([ok("slurm.version", "Slurm")], 80).endswith("No problems found.")
    assert report([], 80).strip() == "No problems found."


def test_sizes() -> None:
    sizes = [size(n) for n in (0, 1023, 1536, 99 * GIB, 3e15)]
    assert sizes == ["0 B", "1023 B", "1.5 KiB", "99 GiB", "2728 TiB"]
