"""The name of this node, and the address at which the others reach it."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Mapping

from raylaunch.errors import BringUpError


def node_name(env: Mapping[str, str]) -> str:
    """Slurm's name of this node, else the host name."""
    return env.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


def interface_address(interface: str) -> str:
    """The IPv4 address of a network interface (SIOCGIFADDR); BringUpError when it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            answer = fcntl.ioctl(probe.fileno(), 0x8915, request)
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise BringUpError(
                f"network interface {interface!r} has no IPv4 address here ({error.strerror})",
                f"Set cluster.interface to one of: {names}.",
            ) from error
    return socket.inet_ntoa(answer[20:24])


def interface_of(own_address: str) -> str | None:
    """The name of the interface that has this address; "lo" for all of 127.0.0.0/8."""
    if own_address.startswith("127."):
        return "lo"
    for _, name in socket.if_nameindex():
        try:
            if interface_address(name) == own_address:
                return name
        except BringUpError:
            continue  # no IPv4 address on this one
    return None


def own_address(peer: str | None, interface: str | None = None) -> str:
    """This node's IPv4 address as its peers reach it.

    The named interface's; else the source address of the route to `peer` (a host name or address;
    no packet is sent); else what the host name resolves to. Never loopback unless there is no other.
    """
    if interface:
        return interface_address(interface)
    for target in (peer, socket.gethostname()):
        if not target:
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target, 9))
            except OSError:
                continue
            found = str(probe.getsockname()[0])
        if not found.startswith("127."):
            return found
    return "127.0.0.1"
