"""`raylaunch doctor` on a real Slurm: what it tells, a node whose cable is slow (tc), one that does not share the state
directory, and what `up` leaves out. Nothing stays behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from helpers import LIMIT, Site, wait_for

from raylaunch.tools.sandbox import Sandbox

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@contextmanager
def inside(site: Site, node: str, do: str, undo: str) -> Iterator[None]:
    """A command in a node, and another that takes it back."""
    site.inside(node, *do.split())
    try:
        yield
    finally:
        site.inside(node, *undo.split())


def doctor(site: Site, code: int, *words: object) -> list[dict[str, Any]]:
    findings: list[dict[str, Any]] = json.loads(site.run("doctor", "--json", *words).expect(code).out)
    return findings


def is_clean(site: Site) -> bool:
    return not site.jobs() and not (site.state / "doctor").exists()


def test_from_the_login_node(site: Site) -> None:
    done = site.run("doctor", env={"COLUMNS": "40"}).expect(0)
    assert max(map(len, done.out.splitlines())) <= 40
    told = " ".join(done.out.split())
    for words in (
        "✓ Slurm 2", "requeue is the default; preemption REQUEUE (partition_prio)", "Slurm accounting is not enabled",
        "✓ main (default): 4 of 4 nodes idle", "a job of 1 node; estimated start: now", "looks node-local",
    ):  # fmt: skip
        assert words in told
    wrong = {one["check"]: one["hint"] for one in doctor(site, 1, "--partition", "nope") if one["status"] == "problem"}
    assert wrong.keys() == {"queue.partition", "user.submit"} and "main" in wrong["queue.partition"]


@pytest.mark.long
def test_the_slow_node_and_the_one_apart_are_found(site: Site) -> None:
    slow = inside(site, "node3", "tc qdisc add dev eth0 root tbf rate 200mbit burst 64k latency 50ms",
                  "tc qdisc del dev eth0 root")  # fmt: skip
    apart = inside(site, "node4", f"mount -t tmpfs raylaunch-test {site.state}", f"umount {site.state}")
    with slow, apart:
        findings = doctor(site, 1, "--nodes", 4)
    problems = {(one["check"], one["node"]): one["text"] for one in findings if one["status"] == "problem"}
    assert problems.keys() == {("nodes.shared", "node4"), ("bandwidth.slow", "node3")}, findings
    assert "not shared" in problems["nodes.shared", "node4"]
    well = {one["check"]: one["text"] for one in findings if one["status"] == "ok"}
    assert "shared with 3 nodes" in well["nodes.shared"] and "3 pairs measured" in well["bandwidth.pairs"]
    assert "clocks agree" in well["nodes.clock"] and "eth0" in well["network.peers"]
    assert is_clean(site)


@pytest.mark.long
def test_an_interrupt_gives_the_nodes_back(site: Site) -> None:
    command = site.start("doctor", "--nodes", 4)
    command.wait_said("starting the checks")
    command.interrupt()
    command.ended().expect(130)
    wait_for("no job and no directory", lambda: is_clean(site), LIMIT, lambda: str(site.jobs()))


@pytest.mark.long
def test_up_leaves_out_a_node_without_memory_and_a_head_whose_gpus_are_sick(
    make_sandbox: Callable[..., Sandbox],
) -> None:
    site = Site.make(make_sandbox(nodes=4, cpus=4, gpus=1), "alice")
    command = site.state / "bin" / "nvidia-smi"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\n[ "$(hostname)" != node1 ] || { echo "Unknown Error"; exit 255; }\n')
    command.chmod(0o755)
    path = {"PATH": f"{command.parent}{os.pathsep}{site.env['PATH']}"}
    with inside(site, "node2", "mount -o remount,size=16m /dev/shm", "mount -o remount,size=50% /dev/shm"):
        done = site.run("up", "--nodes", "2:4", "--gpus-per-node", 1, env=path)
    try:
        done.expect(0, "cluster main is ready: 2 nodes (node3, node4)")
        assert "left out   node1: the GPUs on node1 cannot be used: nvidia-smi says: Unknown Error" in done.out
        assert "left out   node2: /dev/shm on node2 has only 16 MiB free" in done.out
    finally:
        site.run("down", "main").expect(0)
    site.wait_clean()
