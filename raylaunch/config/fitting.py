"""LocatedValue trees → plain values by the schema, and what is wrong with them in words, with the place."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from raylaunch.config.schema import Config, FieldType, Section, section_type
from raylaunch.config.yaml_items import (
    REFERENCES,
    LocatedValue,
    SourceLocation,
    cut,
    hidden,
    scalar,
    shown,
    tag_of,
)

REFERENCE = re.compile(r"\$\$\{|\$\{([^}]*)\}?")
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
SHELL = "slurm.setup"  # lines of shell: `${NAME}` in them is the shell's, on the node


class Fitting:
    """Items → plain values for pydantic, by the schema; collects what pydantic could not place."""

    def __init__(self, check_secrets: bool) -> None:
        self.errors: list[tuple[SourceLocation, str]] = []
        self.broken: set[str] = set()
        """Keys left out because they are wrong: validators over several keys must not judge them."""
        self._check_secrets = check_secrets

    def section(self, item: LocatedValue, model: type[Section], path: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, child in item.value.items():
            key = f"{path}.{name}" if path else name
            if name not in model.model_fields:
                bare = key.partition("//")[0]  # of `slack:https://…`, where a space is missing
                self._bad(child, bare, _unknown(name, model, path))
                continue
            kind = FieldType.of(model, name)
            inner = section_type(model, name)
            if inner is None:
                value = self._value(child, kind, key)
                if key not in self.broken:
                    values[name] = value
            elif isinstance(child.value, dict):
                values[name] = self.section(child, inner, key)
            elif child.value is not None:
                self._bad(child, key, f"must be a section with keys under it, got {shown(child, secret=hidden(key))}")
        return values

    def _value(self, item: LocatedValue, kind: FieldType, key: str) -> Any:
        """The item as a plain value of about that kind; pydantic has the last word."""
        if item.broken:
            self.broken.add(re.sub(r"\[\d+\]$", "", key))
        if isinstance(item.value, dict):
            inner = kind.element(dict)
            fitted = {n: self._value(child, inner, f"{key}.{n}") for n, child in item.value.items()}
            return {n: value for n, value in fitted.items() if f"{key}.{n}" not in self.broken}
        if isinstance(item.value, list):
            inner = kind.element(list)
            return [self._value(child, inner, f"{key}[{i}]") for i, child in enumerate(item.value)]
        if item.value is None:  # `setup:` with all its lines commented out
            return None if kind.takes(type(None)) else [] if kind.takes(list) else {} if kind.takes(dict) else None
        item = self._expanded(item, key)
        exact = kind.takes(type(item.value)) or (isinstance(item.value, int) and kind.takes(float))
        return item.value if exact or item.value is None or not kind.takes(str) else item.text

    def _expanded(self, item: LocatedValue, key: str) -> LocatedValue:
        """`${NAME}` replaced; in slurm.env only checked, so that no secret enters a file of ours."""
        if "${" not in item.text or not isinstance(item.value, str) or key.startswith(SHELL):
            return item
        secret = key.startswith(REFERENCES)
        if item.literal:
            return replace(item, value=item.value.replace("${", "$${")) if secret else item
        if secret and not self._check_secrets:
            return item

        def value_of(match: re.Match[str]) -> str:
            name = match[1]
            if name is None:
                return "${"
            if not match[0].endswith("}") or not _VARIABLE.fullmatch(name):
                self._bad(item, key, f"only ${{NAME}} is understood, got {match[0]}; for plain text write $${{")
            elif name not in os.environ:
                plain = f"; for plain text write $${{{name}}}"
                self._bad(item, key, f"the environment variable {name} is not set{plain}")
            return os.environ.get(name, "")

        text = REFERENCE.sub(value_of, item.text)
        if secret:
            return item
        return replace(item, value=scalar(tag_of(text), text) if item.plain else text, text=text)

    def _bad(self, item: LocatedValue, key: str, message: str) -> None:
        self.errors.append((item.place, f"{key}: {message}"))
        self.broken.add(re.sub(r"\[\d+\]$", "", key))


def _unknown(name: str, model: type[Section], path: str) -> str:
    """What to write in place of a key that is not there."""
    known = list(model.model_fields)
    head, _, rest = name.partition(".")
    if rest and head in known and section_type(model, head):
        return f"keys are nested in a file: write '{rest}:' under '{head}:'"
    elsewhere = _keys_named(name, Config, "")
    word = name.replace("-", "_").lower()
    close, near = (difflib.get_close_matches(word, known, n=1, cutoff=c) for c in (0.75, 0.6))
    if found := elsewhere or close or near:
        return f"unknown key; did you mean {' or '.join(found)}?"
    return f"unknown key; {path or 'the file'} has {', '.join(known)}"


def _keys_named(name: str, model: type[Section], path: str) -> list[str]:
    """All keys of that name, with their sections."""
    found = [f"{path}{name}"] if name in model.model_fields else []
    for section in model.model_fields:
        inner = section_type(model, section)
        found += _keys_named(name, inner, f"{path}{section}.") if inner else []
    return found


def reworded(error: ValidationError, merged: LocatedValue, broken: set[str]) -> list[tuple[SourceLocation, str]]:
    """pydantic's errors, one a key, as `key: what is allowed, what was given`."""
    found: dict[str, tuple[SourceLocation, str]] = {}
    for detail in error.errors(include_url=False):
        key, kind, item = _locate(detail["loc"], merged)
        own = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else ""
        if kind is None:  # a validator over several keys
            if not any(not key or b == key or b.startswith(f"{key}.") for b in broken):
                place = _blamed(own, item).place
                found.setdefault(key, (place, f"{key}: {own}" if key else own))
            continue
        words = shown(item, secret=hidden(key))
        advice = "" if hidden(key) else _advice(item, kind)
        given = "" if detail["loc"][-1] == "[key]" else f", got {words}{advice}"
        found.setdefault(key, (item.place, f"{key}: {own or f'must be {kind}'}{given}"))
    return list(found.values())


def _locate(loc: Sequence[int | str], merged: LocatedValue) -> tuple[str, FieldType | None, LocatedValue]:
    """pydantic's location → key, kind and item; its names for branches of a union are left out."""
    key, item = "", merged
    model: type[Section] | None = Config
    kind: FieldType | None = None
    for part in loc:
        if model is not None and isinstance(part, str) and part in model.model_fields:
            key = f"{key}.{part}" if key else part
            item = item.value.get(part, LocatedValue(item.place, None))
            inner = section_type(model, part)
            kind = None if inner else FieldType.of(model, part)
            model = inner
        elif kind is not None and isinstance(part, int) and isinstance(item.value, list):
            key, item, kind = f"{key}[{part}]", item.value[part], kind.element(list)
        elif kind is not None and isinstance(item.value, dict) and part in item.value:
            key, item, kind = f"{key}.{part}", item.value[part], kind.element(dict)
    return key, kind, item


def _blamed(message: str, item: LocatedValue) -> LocatedValue:
    """Of the keys that a message names, the one written last; else the section."""
    words = set(re.findall(r"\w+", message))
    owners = [item.value, *(c.value for c in item.value.values() if isinstance(c.value, dict))]
    named = [child for owner in owners for name, child in owner.items() if name in words]
    scalars = [child for child in named if not isinstance(child.value, dict)]
    return max(scalars, key=lambda child: child.place, default=item)


def _advice(item: LocatedValue, kind: FieldType) -> str:
    """A correction, where one can be guessed."""
    if len(kind.choices) > 1 and item.text:
        near = difflib.get_close_matches(item.text, kind.choices, n=1, cutoff=0.5)
        return f"; did you mean {near[0]}?" if near else ""
    if kind.takes(list) and isinstance(item.value, str):
        return f"; write [{cut(item.text)}]"
    word = item.text.lower()
    if kind.takes(bool) and word in {"yes", "on", "y", "1", "no", "off", "n", "0"}:
        return f"; write {'true' if word in {'yes', 'on', 'y', '1'} else 'false'}"
    if kind.takes(int) and isinstance(item.value, float) and item.value.is_integer() and abs(item.value) < 1e15:
        return f"; write {int(item.value)}"
    return ""
