"""The daemons outside the nodes: munged, slurmctld and, for accounting, MariaDB and slurmdbd.

Each runs in the foreground under the sandbox's "head" cgroup, so its pid is known from the
start and nothing has to be looked for. They belong to nobody: `up` may end before they do.
"""

from __future__ import annotations

import secrets
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from raylaunch.errors import SandboxError
from raylaunch.tools.sandbox import cgroups
from raylaunch.tools.sandbox.node import system_env, tail
from raylaunch.tools.sandbox.procs import Proc, wait_for
from raylaunch.tools.sandbox.spec import CONTROLLER, SandboxLayout, SandboxSpec

HEAD = "head"  # the cgroup of everything that is not a node

# Joins the cgroup, starts the daemon in a session of its own, says its pid.
_SPAWN = 'echo 0 > "$1" || exit 1; shift; setsid "$@" </dev/null >>"$LOG" 2>&1 & echo $!'
# Slurm's daemons look up their own host name: they get one, and the nodes' /etc/hosts.
_NAMED = f'hostname {CONTROLLER} && mount --bind "$1" /etc/hosts && shift && exec "$@"'


def start_munged(layout: SandboxLayout) -> None:
    """munged with a key and a socket of its own; ready when the socket is there."""
    layout.munge_key.touch(mode=0o400)
    layout.munge_key.write_bytes(secrets.token_bytes(128))
    where = layout.munge_socket.parent
    _spawn(
        layout,
        "munged",
        [
            *("munged", "--foreground", "--force"),
            f"--socket={layout.munge_socket}",
            f"--key-file={layout.munge_key}",
            f"--pid-file={where}/munged.pid",
            f"--seed-file={where}/munged.seed",
            f"--log-file={where}/munged.log",
        ],
    )
    _wait_up(layout, "munged", lambda: _accepts(layout.munge_socket))


def start_slurmctld(layout: SandboxLayout) -> None:
    """slurmctld under its own host name; `wait_slurmctld` says when it answers."""
    _spawn(layout, "slurmctld", _renamed(layout, ["slurmctld", "-D", "-f", str(layout.slurm_conf)]))


def wait_slurmctld(layout: SandboxLayout, spec: SandboxSpec) -> None:
    _wait_up(layout, "slurmctld", lambda: _accepts((spec.gateway, spec.ctld_port)))


def start_accounting(layout: SandboxLayout, spec: SandboxSpec) -> None:
    """MariaDB on a private socket without passwords, then slurmdbd; ready when both answer."""
    layout.database.mkdir(mode=0o700)
    _spawn(
        layout,
        "mariadbd",
        [
            *("mariadbd", "--no-defaults", "--user=root", f"--datadir={layout.database}"),
            # No grant tables: nothing to install first. Only root can reach the socket.
            *("--skip-grant-tables", "--skip-networking", f"--socket={layout.database_socket}"),
            f"--pid-file={layout.run}/mariadbd.pid",
            # The data do not outlive the sandbox: no time for making them durable.
            *("--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=32M"),
            *("--innodb-log-file-size=8M", "--innodb-lock-wait-timeout=900", "--performance-schema=OFF"),
        ],
    )
    _wait_up(layout, "mariadbd", lambda: _accepts(layout.database_socket), timeout=60)
    _spawn(
        layout,
        "slurmdbd",
        _renamed(layout, ["slurmdbd", "-D"]),
        # slurmdbd finds its configuration beside slurm.conf, and the database by this variable.
        {"SLURM_CONF": str(layout.slurm_conf), "MYSQL_UNIX_PORT": str(layout.database_socket)},
    )
    _wait_up(layout, "slurmdbd", lambda: _accepts((spec.gateway, spec.dbd_port)), timeout=60)


def _spawn(layout: SandboxLayout, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
    group = cgroups.group(layout, HEAD)
    group.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["sh", "-c", _SPAWN, "sh", str(group / "cgroup.procs"), *argv],
        env={**system_env(), "LOG": str(_log(layout, name)), **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    if done.returncode != 0:
        raise SandboxError(f"{name} could not be started", done.stderr.strip())
    try:
        Proc.of(int(done.stdout)).save(record(layout, name))
    except ProcessLookupError:
        raise SandboxError(f"{name} ended at once", tail(_log(layout, name))) from None


def record(layout: SandboxLayout, name: str) -> Path:
    return layout.run / f"{name}.json"


def _wait_up(layout: SandboxLayout, name: str, ready: Callable[[], bool], timeout: float = 20) -> None:
    proc = Proc.load(record(layout, name))

    def up() -> bool:
        if proc is None or not proc.alive():
            raise SandboxError(f"{name} ended while it started", tail(_log(layout, name)))
        return ready()

    wait_for(f"{name} answers", up, timeout, lambda: tail(_log(layout, name)))


def _renamed(layout: SandboxLayout, argv: Sequence[str]) -> list[str]:
    hosts = str(layout.dir / "etc" / "hosts")
    return ["unshare", "--uts", "--mount", "sh", "-c", _NAMED, "sh", hosts, *argv]


def _log(layout: SandboxLayout, name: str) -> Path:
    return layout.log / f"{name}.out"


def _accepts(address: Path | tuple[str, int]) -> bool:
    family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        return probe.connect_ex(str(address) if isinstance(address, Path) else address) == 0
