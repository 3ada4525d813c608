"""Slurm's text about a site → values: its settings, this user's accounts, when a tested job would start. Pure, as
`parse` is for jobs and nodes; `client` runs the commands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from raylaunch.scheduler.slurm.parse import parse_when

ASSOCIATION_FORMAT = "Account,Partition,QOS,DefaultQOS"
"""For `sacctmgr show associations`."""
SHARE_FORMAT = "Account,FairShare"
"""For `sshare`."""


@dataclass(frozen=True, slots=True)
class Association:
    """One account that a user may use; `partition` "": in all of them."""

    account: str
    partition: str
    qos: tuple[str, ...]
    default_qos: str


def parse_settings(text: str) -> dict[str, str]:
    """`scontrol show config`: `Name = value` lines; what else it prints is passed over."""
    pairs = (line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Za-z_]\w*\s*=", line))
    return {name.strip(): value.strip() for name, value in pairs}


def parse_default_memory(text: str, partition: str | None, settings: Mapping[str, str]) -> dict[str, int]:
    """`scontrol show partition --oneliner` and the site's settings → MiB by DefMemPerCPU or DefMemPerNode; {}: no limit."""
    rows = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in text.splitlines()]
    own = [r for r in rows if (r.get("PartitionName") == partition if partition else r.get("Default") == "YES")]
    for said in (*own, settings):
        for name in ("DefMemPerCPU", "DefMemPerNode"):
            if (value := said.get(name, "")).isdigit() and int(value):
                return {name: int(value)}
    return {}


def parse_associations(text: str) -> list[Association]:
    """`sacctmgr -n -P show associations` with ASSOCIATION_FORMAT; lines of another shape are passed over."""
    rows = []
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) == ASSOCIATION_FORMAT.count(",") + 1 and fields[0]:
            account, partition, qos, default = fields
            rows.append(Association(account, partition, tuple(filter(None, qos.split(","))), default))
    return rows


def parse_shares(text: str) -> dict[str, float]:
    """`sshare -n -P` with SHARE_FORMAT: account → fair-share factor, up to 1. (Where priorities know none it says 0.)"""
    found = {}
    for line in text.splitlines():
        account, _, share = line.strip().rpartition("|")
        if account.strip() and re.fullmatch(r"[01]\.\d+", share) and float(share):
            found[account.strip()] = float(share)
    return found


def parse_estimate(text: str) -> tuple[datetime | None, str]:
    """What `sbatch --test-only` says: (when the job would start, on which nodes); (None, "") if it does not."""
    match = re.search(r"to start at (\S+) using .* on (?:nodes )?(\S+)", text)
    return (parse_when(match[1]), match[2]) if match else (None, "")
