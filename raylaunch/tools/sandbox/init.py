"""A node's first process: makes the namespaces, becomes their PID 1, starts slurmd, reaps.

Run as a script by path (`python -I -S init.py`), with the standard library only, so that it
starts in milliseconds and needs no import path. The talk with `up` is over stdin and stdout:

1. `up` writes one line of JSON (see `NodePlan` in node.py);
2. the outer process joins the node's cgroups, unshares, forks, writes the pid of the fork
   and ends; the fork is PID 1 of the node and sets up its mounts;
3. `up` plugs the cable into that pid's network namespace and writes "go";
4. PID 1 configures the network, starts slurmd and from then on only reaps.

If stdin ends before "go", `up` is dead and PID 1 ends too, taking the node with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x20000, 0x2000000, 0x4000000
CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWTIME = 0x8000000, 0x20000000, 0x40000000, 0x80
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    result = _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode() or None)
    _check(result, f"mount {kind or source} on {target}")


def _restart_clocks() -> None:
    # The node's uptime starts now: Slurm tells a rebooted node by its boot time. The monotonic
    # clock moves too, as between real machines, where comparing it across nodes is a mistake.
    lines = []
    for name, clock in (("monotonic", time.CLOCK_MONOTONIC), ("boottime", time.CLOCK_BOOTTIME)):
        seconds, nanoseconds = divmod(-time.clock_gettime_ns(clock), 10**9)
        lines.append(f"{name} {seconds} {nanoseconds}\n")
    Path("/proc/self/timens_offsets").write_text("".join(lines))


def _device(path: str, major: int, minor: int) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(major, minor))
    Path(path).chmod(0o666)  # mknod heeds the umask


def _setup_dev(gpu_devices: list[str]) -> None:
    _mount("tmpfs", "/dev", "tmpfs", MS_NOSUID, "mode=755,size=1m")
    standard = {"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9}
    for name, minor in standard.items():
        _device(f"/dev/{name}", 1, minor)
    _device("/dev/tty", 5, 0)
    _device("/dev/kmsg", 1, 11)
    Path("/dev/kmsg").chmod(0o600)  # the machine's: one kernel has all nodes
    for path in gpu_devices:
        _device(path, 1, 3)
    for name, target in {
        "fd": "/proc/self/fd",
        "stdin": "/proc/self/fd/0",
        "stdout": "/proc/self/fd/1",
        "stderr": "/proc/self/fd/2",
        "ptmx": "pts/ptmx",
    }.items():
        Path(f"/dev/{name}").symlink_to(target)
    Path("/dev/pts").mkdir()
    _mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5")
    Path("/dev/shm").mkdir()
    _mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    Path("/dev/mqueue").mkdir()
    _mount("mqueue", "/dev/mqueue", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC)


def _setup_mounts(plan: dict[str, Any]) -> None:
    _mount("none", "/", "", MS_REC | MS_PRIVATE)  # nothing done here reaches the machine
    _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    # A fresh sysfs shows this node's network; the cgroup mount shows this node's cgroups only.
    _mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    _mount("tmpfs", "/sys/fs/cgroup", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=755")
    if plan["freezer"]:
        Path("/sys/fs/cgroup/freezer").mkdir()
        _mount("cgroup", "/sys/fs/cgroup/freezer", "cgroup", MS_NOSUID | MS_NODEV | MS_NOEXEC, "freezer")
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    _setup_dev(plan["gpu_devices"])
    for target, source in plan["files"].items():
        if Path(target).exists():
            _mount(source, target, "", MS_BIND)


def _reap_for_ever() -> None:
    while True:
        signal.sigwait({signal.SIGCHLD})
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break


def _start(argv: list[str], env: dict[str, str]) -> None:
    if os.fork() == 0:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.execvpe(argv[0], argv, env)


def _node(plan: dict[str, Any]) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    os.setsid()
    os.chdir("/")
    os.umask(0o022)
    socket.sethostname(plan["name"])
    _setup_mounts(plan)
    if sys.stdin.readline() != "go\n":
        raise SystemExit("up ended before the node was ready")
    subprocess.run(["ip", "-batch", "-"], input="\n".join(plan["network"]), text=True, check=True)
    # The pipes to `up` end here; from now on the log file is the only output.
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    _start(plan["command"], plan["env"])
    _reap_for_ever()


def main() -> None:
    plan = json.loads(sys.stdin.readline())
    for procs in plan["cgroups"]:
        Path(procs).write_text("0")  # first of all, so that whatever follows can be found and ended
    namespaces = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    _check(_libc.unshare(namespaces | CLONE_NEWTIME), "unshare")
    _restart_clocks()
    pid = os.fork()
    if pid == 0:
        _node(plan)
    print(pid, flush=True)


if __name__ == "__main__":
    main()
