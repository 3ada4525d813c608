"""Mail, which Slurm sends of its own job's states only: what of `alerts.mail` it can do, and the rest by this node's
own mailer, where it has one. Pure, but for `mailer`, which looks for that."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from email.message import EmailMessage
from typing import Any

from raylaunch.config.schema import AlertKind, Config, SlurmConfig

_SLURM: dict[AlertKind, str] = {
    "started": "BEGIN", "finished": "END", "failed": "FAIL", "held": "REQUEUE", "walltime": "TIME_LIMIT_90"
}  # fmt: skip
"""sbatch(1), --mail-type."""
_MORE = ("/usr/sbin", "/usr/lib", "/sbin")
"""Where sendmail lies on nodes whose PATH is a user's."""


def through_slurm(config: Config) -> SlurmConfig:
    """With Slurm's own mails about the base job: the only ones that come when none of our processes is left to write."""
    slurm, alerts = config.slurm, config.alerts
    types = [word for kind, word in _SLURM.items() if kind in alerts.kinds]
    if alerts.mail is None or not types:
        return slurm
    return slurm.model_copy(
        update={"mail_user": slurm.mail_user or alerts.mail, "mail_type": slurm.mail_type or ",".join(types)}
    )


def mailer(address: str, subject: str) -> list[str] | None:
    """The command that takes a mail on its stdin; None where there is none. (`mail` takes its text alone.)"""
    path = os.pathsep.join([os.environ.get("PATH", ""), *_MORE])
    if found := shutil.which("sendmail", path=path):
        return [found, "-i", "-t"]
    if found := shutil.which("mail", path=path) or shutil.which("mailx", path=path):
        return [found, "-s", subject, address]
    return None


def subject(message: Mapping[str, Any]) -> str:
    first = str(message["text"]).partition("\n")[0]
    return "".join(c if c.isprintable() else " " for c in f"[raylaunch] {message['run']}: {first}")[:200]


def letter(message: Mapping[str, Any], address: str, text: str) -> bytes:
    """The whole mail, for sendmail."""
    mail = EmailMessage()
    mail["To"], mail["Subject"] = address, subject(message)
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content(text)
    return bytes(mail)
