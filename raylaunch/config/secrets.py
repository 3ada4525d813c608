"""Webhook addresses are secrets: whoever has one can write into the channel.

A config may name them: `env:NAME` or `file:PATH`. They are looked up once, when a run is handed over, and then lie in
the run's config.yaml (0600) and nowhere else. A file that others may read is refused. No message here holds a value.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pydantic import SecretStr

from raylaunch.config.schema import URL_PATTERN, AlertsConfig
from raylaunch.errors import UsageError

LONGEST = 4096


def resolved(alerts: AlertsConfig) -> AlertsConfig:
    """With the addresses themselves; UsageError for one that cannot be had."""
    found = {name: _resolve(f"alerts.{name}", value) for name, value in alerts.addresses.items()}
    return alerts.model_copy(update=found)


def _resolve(key: str, secret: SecretStr) -> SecretStr:
    written = secret.get_secret_value()
    kind, _, place = written.partition(":")
    if kind == "env":
        text, where = os.environ.get(place), f"the environment variable {place}"
        if text is None:
            raise UsageError(f"{key}: {where} is not set", f"export {place}=https://… before this command.")
    elif kind == "file":
        text, where = _read(key, Path(place).expanduser()), place
    else:
        return secret
    if not URL_PATTERN.fullmatch(text.strip()):
        raise UsageError(
            f"{key}: what {where} contains is not a URL", "It must start with https:// and contain no spaces."
        )
    return SecretStr(text.strip())


def _read(key: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise UsageError(f"{key}: {path} contains a secret and is readable by other users", f"chmod 600 {path}")
            return file.read(LONGEST).decode(errors="replace")
    except OSError as error:
        raise UsageError(f"{key}: cannot read {path}: {error.strerror}", "Check the path.") from error
