"""The sandbox's network: one bridge on the machine, one cable (veth pair) per node.

Everything goes through `ip -batch`, one process for many links. A node's hardware address
follows from its number, so that a node that returns is still known to its neighbours.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raylaunch.errors import SandboxError
from raylaunch.host import locks
from raylaunch.tools.sandbox.spec import BASE, SandboxLayout, SandboxSpec

LOCK_LIMIT = 60.0
"""Seconds to wait for another sandbox that is making its network."""


def choose_network(layout: SandboxLayout) -> int:
    """A third byte for 10.213.x.0/24 that no route of this machine overlaps.

    Call it under `network_lock` and add the bridge before letting go.
    """
    taken = []
    for route in _ip_json("-4", "route", "show", "table", "all"):
        with contextlib.suppress(ValueError):  # "default" and the like
            net = ipaddress.ip_network(route["dst"], strict=False)
            if net.prefixlen > 4:
                taken.append(net)
    first = hashlib.sha256(layout.name.encode()).digest()[0]
    for step in range(256):
        number = (first + step) % 256
        mine = ipaddress.ip_network(f"10.213.{number}.0/24")
        if not any(mine.overlaps(net) for net in taken):
            return number
    raise SandboxError("no free network 10.213.x.0/24", "take sandboxes down: raylaunch sandbox down --name …")


@contextlib.contextmanager
def network_lock() -> Iterator[None]:
    """One `up` at a time chooses a subnet. The lock is on a directory: it leaves no file behind."""
    fd = os.open(BASE, os.O_RDONLY | os.O_DIRECTORY)
    deadline = time.monotonic() + LOCK_LIMIT
    try:
        while not locks.lock(fd):
            if time.monotonic() > deadline:
                raise SandboxError(
                    f"another sandbox has chosen its network for {LOCK_LIMIT:g} s", f"Find it with `fuser {BASE}`."
                )
            time.sleep(locks.PAUSE)
        yield
    finally:
        os.close(fd)


def add_bridge(layout: SandboxLayout, spec: SandboxSpec) -> None:
    _ip(
        [
            f"link add {layout.bridge} address {_mac(spec, 0)} type bridge",
            f"addr add {spec.gateway}/24 dev {layout.bridge}",
            f"link set {layout.bridge} up",
        ]
    )


def plug(layout: SandboxLayout, spec: SandboxSpec, pids: dict[str, int]) -> None:
    """Give each node (name → pid of its init) its eth0; its other end goes to the bridge."""
    batch = []
    for node, pid in pids.items():
        index = spec.index(node)
        veth = layout.veth(index)
        batch += [
            f"link add {veth} type veth peer name eth0 address {_mac(spec, index)} netns {pid}",
            f"link set {veth} master {layout.bridge} up",
        ]
    _ip(batch)


def node_setup(spec: SandboxSpec, node: str) -> list[str]:
    """The `ip -batch` lines that a node runs for itself, once its eth0 is there."""
    return [
        "link set lo up",
        f"addr add {spec.address(node)}/24 dev eth0",
        "link set eth0 up",
        # It leads nowhere but makes "my address towards the world" be that of eth0.
        f"route add default via {spec.gateway}",
    ]


def unplug(layout: SandboxLayout, spec: SandboxSpec, node: str) -> None:
    """Remove a node's cable, if it is there; both ends go."""
    veth = layout.veth(spec.index(node))
    if veth in existing(layout):
        _ip([f"link del {veth}"], forgive_missing=True)


def cut(layout: SandboxLayout, spec: SandboxSpec, node: str) -> None:
    """Take the node's cable off the bridge. Its carrier stays, so nobody notices but by silence."""
    veth = layout.veth(spec.index(node))
    # Off the bridge, the cable's end is an interface of the machine, which would answer
    # questions for the gateway's address on any of its interfaces.
    Path(f"/proc/sys/net/ipv4/conf/{veth}/arp_ignore").write_text("8")
    _ip([f"link set {veth} nomaster"])


def heal(layout: SandboxLayout, spec: SandboxSpec, node: str) -> None:
    """Put the node's cable back on the bridge."""
    _ip([f"link set {layout.veth(spec.index(node))} master {layout.bridge}"])


def is_cut(layout: SandboxLayout, spec: SandboxSpec, node: str) -> bool:
    """Whether the node has a cable that leads nowhere."""
    link = Path("/sys/class/net", layout.veth(spec.index(node)))
    return link.exists() and not (link / "master").exists()


def existing(layout: SandboxLayout) -> list[str]:
    """Names of this sandbox's links on the machine."""
    return sorted(p.name for p in Path("/sys/class/net").iterdir() if p.name.startswith(layout.link_prefix))


def remove_all(layout: SandboxLayout) -> None:
    """Remove bridge and cables; those of dying nodes may vanish by themselves meanwhile."""
    _ip([f"link del {name}" for name in existing(layout)], forgive_missing=True)


def _mac(spec: SandboxSpec, index: int) -> str:
    return f"02:72:6c:{spec.network:02x}:00:{index:02x}"


def _ip(batch: Sequence[str], forgive_missing: bool = False) -> None:
    if not batch:
        return
    argv = ["ip", *(["-force"] if forgive_missing else []), "-batch", "-"]
    done = subprocess.run(argv, input="\n".join(batch), capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("Command failed")]
    if forgive_missing:
        gone = ("Cannot find device", "No such device")  # before and after the kernel was asked
        errors = [line for line in errors if not any(text in line for text in gone)]
    if errors or (done.returncode != 0 and not forgive_missing):
        raise SandboxError("ip failed: " + "; ".join(errors), "the lines were: " + "; ".join(batch))


def _ip_json(*args: str) -> list[dict[str, Any]]:
    done = subprocess.run(["ip", "-json", *args], capture_output=True, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout or "[]")
    return rows
