"""The configuration of a run without secrets, and its differences from the defaults. Pure, except for reading one file.

Hidden: every literal in `slurm.env` (references like ${NAME} stay), the value of a key or an option whose name refers
to a secret, all addresses under `alerts`, and the user and password in any URL.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raylaunch.config.schema import Config, CostConfig

HIDDEN = "(hidden)"
LARGEST = 1 << 20
_SECRET = r"[\w.-]*(?:token(?!s|i[sz])|secret|passw|api_?key|access_?key|private_?key|credential|webhook|_key\b|-key\b)[\w.-]*"
_NAMED = re.compile(_SECRET, re.IGNORECASE)
_ASSIGNED = re.compile(rf"(?i)\b({_SECRET})(\s*[=:]\s*|\s+)(\"[^\"]*\"|'[^']*'|[^\s\"']+)")
_USERINFO = re.compile(r"(?<=://)[^/\s@]+@")
_QUERY = re.compile(r"([?&][\w.-]+=)[^&\s]+")
_REFERENCE = re.compile(r"\$\{\w+\}")


def read(path: Path) -> dict[str, Any] | None:
    """A config.yaml as plain values; None if it is missing or cannot be read."""
    try:
        if path.stat().st_size > LARGEST:
            return None
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def without_secrets(value: Any, key: str = "") -> Any:
    """The same values, with possible secrets replaced; `key`: the dotted key of this value."""
    if isinstance(value, dict):
        return {name: without_secrets(child, f"{key}.{name}" if key else str(name)) for name, child in value.items()}
    if isinstance(value, list):
        return _list(value, key)
    name = key.rsplit(".", 1)[-1]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = str(value)
    if key.startswith("slurm.env"):
        return text if _REFERENCE.fullmatch(text) else HIDDEN
    if _REFERENCE.fullmatch(text):
        return text
    if _NAMED.fullmatch(name) or (key.startswith("alerts") and "://" in text):
        return HIDDEN
    return _cleaned(text)


def _list(values: list[Any], key: str) -> list[Any]:
    """`--api-key XYZ` may be two words."""
    found: list[Any] = []
    for index, item in enumerate(values):
        before = values[index - 1] if index else None
        option = isinstance(before, str) and before.startswith("-") and "=" not in before
        if option and isinstance(item, str) and _NAMED.fullmatch(str(before).lstrip("-")):
            found.append(HIDDEN)
        else:
            found.append(without_secrets(item, key))
    return found


def _cleaned(text: str) -> str:
    text = _USERINFO.sub("…@", text)
    text = _QUERY.sub(rf"\1{HIDDEN}", text) if "://" in text else text
    return _ASSIGNED.sub(lambda m: m[0] if _REFERENCE.search(m[3]) else f"{m[1]}{m[2]}{HIDDEN}", text)


def text(values: dict[str, Any]) -> str:
    """As YAML."""
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120))


def differences(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted key → value, for values other than the default and keys unknown to this version."""
    defaults = _flat(Config().model_dump())
    return {
        key: value
        for key, value in _flat(values).items()
        if not (key in defaults and defaults[key] == value) and not (value in (None, [], {}) and key not in defaults)
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{key}.")
        else:
            found[key] = value
    return found


def prices(values: dict[str, Any] | None, site: CostConfig) -> CostConfig:
    """The effective prices: those of the run's configuration if it has any, else those of the user's file as it is now."""
    own = at(values, "cost")
    known = {name: own[name] for name in CostConfig.model_fields if name in own} if isinstance(own, dict) else {}
    try:
        found = CostConfig.model_validate(known)
    except ValidationError:
        return site
    return found if found.gpu_hour is not None or found.node_hour is not None else site


def at(values: dict[str, Any] | None, key: str) -> Any:
    """The value of a dotted key, or None."""
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found
