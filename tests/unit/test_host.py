"""Ports, temp directories, resources: on this machine's real sockets and files."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylaunch.errors import BringUpError
from raylaunch.host import network, ports, resources, temp_dir


def test_two_leases_never_meet() -> None:
    first, second = ports.lease_ports(), ports.lease_ports()
    try:
        assert abs(first.ports.base - second.ports.base) >= ports.PORT_BLOCK
        for block in (first.ports, second.ports):
            low, high = block.workers
            assert ports.PORTS_FROM <= block.base < low < high < ports.PORTS_TO <= 32768
    finally:
        first.close()
        second.close()


def test_the_last_block_is_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    last = ports.lease_ports()
    last.close()

    def that_one_first(blocks: range, _: int) -> list[int]:
        return sorted(blocks, key=lambda base: base != last.ports.base)

    monkeypatch.setattr(ports.random, "sample", that_one_first)
    again = ports.lease_ports(last.ports)
    again.close()
    assert again.ports.base != last.ports.base


def test_a_block_with_a_port_that_somebody_holds_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    lease = ports.lease_ports()
    lease.close()
    monkeypatch.setattr(ports, "PORTS_FROM", lease.ports.base)  # that one alone: others may be somebody's
    monkeypatch.setattr(ports, "PORTS_TO", lease.ports.base + ports.PORT_BLOCK)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", lease.ports.gcs))
        holder.listen()
        with pytest.raises(BringUpError, match="no block of 512 free ports"):
            ports.lease_ports()


def test_services_have_a_port_each() -> None:
    block = ports.Ports(20000)
    names = [
        n
        for n in dir(ports.Ports)
        if isinstance(getattr(ports.Ports, n), property) and n not in {"workers", "spare", "block"}
    ]
    values = [getattr(block, n) for n in names]
    assert len(set(values)) == len(values) >= 9
    assert block.base < min(values) <= max(values) < block.spare[0] <= block.spare[-1] < block.workers[0]


def test_temp_dir_is_short_and_apart() -> None:
    paths = {
        temp_dir.temp_dir_path("/tmp", key, index)
        for key in ("/a/clusters/x", "/b/clusters/x")
        for index in (None, "1", "2")
    }
    assert len(paths) == 6
    longest = max(len(str(p)) for p in paths) + len(
        "/r/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.1"
    )
    assert longest <= 107


def test_a_temp_dir_that_is_too_long_says_so_before_ray_does() -> None:
    with pytest.raises(BringUpError, match="of at most 107") as caught:
        temp_dir.temp_dir_path("/scratch/" + "x" * 60, "key")
    assert "cluster.temp_dir" in caught.value.hint


def test_leftovers_of_ours_go_and_a_trap_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "old").touch()
    temp_dir.claim_temp_dir(mine)
    assert {p.name for p in mine.iterdir()} == {"r", "tmp"} and mine.stat().st_mode & 0o777 == 0o700
    target = tmp_path / "elsewhere"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(BringUpError, match="belongs to"):
        temp_dir.claim_temp_dir(tmp_path / "link")
    assert target.exists()


@pytest.fixture
def short() -> Iterator[str]:
    """A directory with a short path, as sockets need it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        yield path


def test_a_directory_is_whole_while_a_driver_makes_ray_s_link_anew(short: str) -> None:
    temp = temp_dir.TempDir(short, "key", None)
    temp.claim()
    assert not temp.is_whole()
    session = temp.path / "r" / "session_2026-11-21_21-51-05_012491_457"
    (session / "sockets").mkdir(parents=True)
    assert temp.is_whole()  # with no session_latest
    shutil.rmtree(session)
    assert not temp.is_whole()
    temp.remove()


def test_what_a_dead_agent_left_goes_and_what_a_living_one_has_stays(short: str) -> None:
    base, joiner, other = (temp_dir.TempDir(short, "key", suffix) for suffix in (None, "7", "8"))
    assert len({base.path, joiner.path, other.path}) == 3
    base.claim()
    joiner.claim()
    other.claim()
    other._release()  # as its end would
    base.claim()
    assert joiner.path.exists() and not other.path.exists() and base.path.exists()
    assert joiner.remove() == 0 and not joiner.path.exists() and other.remove() == 0
    foreign = temp_dir.TempDir(short, "key", None)
    assert foreign.remove() == 0 and base.path.exists()  # never claimed by this one
    base.remove()


def test_cpus_follow_the_binding_then_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert resources.count_cpus({"SLURM_CPUS_PER_TASK": "16"}) == 6
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert resources.count_cpus({"SLURM_CPUS_PER_TASK": "16"}) == 16
    assert resources.count_cpus({"SLURM_CPUS_ON_NODE": "8"}) == 8


def test_memory_takes_the_tightest() -> None:
    assert resources.memory_limit({"SLURM_MEM_PER_NODE": "100"}) == 100 << 20
    assert resources.memory_limit({}) > 100 << 20


def test_gpus_are_what_the_job_sees() -> None:
    assert resources.visible_gpus({"CUDA_VISIBLE_DEVICES": "0,3"}) == ("0", "3")
    assert resources.visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()


def test_local_nodes_divide_the_machine() -> None:
    whole, half = (
        resources.find_resources({"SLURM_CPUS_PER_TASK": "4"}),
        resources.find_resources({"SLURM_CPUS_PER_TASK": "4"}, 2),
    )
    assert half.memory == whole.memory // 2 and half.cpus <= whole.cpus


def test_interface_and_address() -> None:
    assert network.interface_of("127.0.0.7") == "lo"
    assert network.interface_address("lo") == "127.0.0.1"
    with pytest.raises(BringUpError, match="nosuch0"):
        network.interface_address("nosuch0")
