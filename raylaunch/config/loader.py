"""Reading configuration: defaults < user file < given file < flags < `--set a.b=c`.

YAML text → `LocatedValue` trees that know where each value was written → merged (mappings merge, all else
replaces) → `${NAME}` expanded → fitted to the schema → validated → `Config`. All that is wrong is
collected and raised as one ConfigError, a line each: `file:line: key: what is allowed`.
It refuses: unknown and duplicate keys, conversions that guess (`yes`, base-60 numbers, dates), and
environment variables anywhere but where `${NAME}` is written.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr, ValidationError

from raylaunch.config.convert import nemo
from raylaunch.config.schema import Config, FieldType, Section, section_type
from raylaunch.config.yaml_items import (
    REFERENCES,
    TAG,
    LocatedValue,
    Reading,
    SourceLocation,
    cut,
    from_python,
    hidden,
    nest,
    scalar,
    shown,
    tag_of,
)
from raylaunch.errors import ConfigError

USER_FILE = Path("~/.config/raylaunch/config.yaml")
"""Stands for the user's own file; $XDG_CONFIG_HOME is looked at when loading."""

_REFERENCE = re.compile(r"\$\$\{|\$\{([^}]*)\}?")
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SHELL = "slurm.setup"  # lines of shell: `${NAME}` in them is the shell's, on the node


def load(
    path: Path | None,
    sets: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    user_file: Path | None = USER_FILE,
    tell: Callable[[str], None] = lambda _: None,
) -> Config:
    """The configuration from all layers, later ones winning: user file, `path`, `overrides`, `sets`.

    `overrides` are flags by dotted key ("slurm.nodes"); None (or an empty tuple) is "not given".
    `sets` are `a.b=c` with c in YAML. `tell` gets a line for each key of a NeMo AutoModel file that has no meaning
    here (see `nemo`). Raises ConfigError with everything that is wrong, UsageError
    for a --set that cannot be read.
    """
    reading = Reading()
    if user_file is USER_FILE:
        user_file = default_user_file()
    if user_file is not None and _is_there(user_file):
        reading.file(1, user_file)
    if path is not None:
        reading.file(2, path)
        if nemo.is_theirs(reading.layers[-1]):
            reading.layers[-1] = nemo.translate(reading.layers[-1], tell)
    for key, value in (overrides or {}).items():
        if value is not None and value != ():
            reading.layers.append(nest(key, from_python(value)))
    for text in sets:
        reading.set(text)
    return _resolve(reading, check_secrets=True)


def load_resolved(path: Path) -> Config:
    """A file that `dump` wrote: no user file, and the variables of slurm.env need not be set here."""
    reading = Reading()
    reading.file(2, path)
    return _resolve(reading, check_secrets=False)


def dump(config: Config) -> str:
    """The complete YAML text, in the schema's order; it loads to an equal Config. With all secrets: for 0600 files."""
    values = {key: _escaped(value, key) for key, value in config.model_dump().items()}
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)
    return f"# Resolved by raylaunch: every value as it is used.\n{text}"


def shell_word(value: str) -> str:
    """A slurm.env value as one shell word: `${NAME}` left to the shell, all else quoted.

    `shell_word("a b${KEY}")` is `'a b'"${KEY}"`.
    """
    words, end = [], 0
    for match in _REFERENCE.finditer(value):
        literal = value[end : match.start()] + ("${" if match[1] is None else "")
        words += [shlex.quote(literal)] if literal else []
        words += [f'"${{{match[1]}}}"'] if match[1] is not None else []
        end = match.end()
    if value[end:] or not words:
        words.append(shlex.quote(value[end:]))
    return "".join(words)


def default_user_file() -> Path | None:
    """$XDG_CONFIG_HOME/raylaunch/config.yaml, else under ~/.config; None for a user without a home."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    if Path(base).is_absolute():
        return Path(base) / "raylaunch" / "config.yaml"
    try:
        return USER_FILE.expanduser()
    except RuntimeError:  # no HOME and no passwd entry, as in some containers
        return None


def _is_there(path: Path) -> bool:
    """False too where we may not look, as for a job that runs with another user's HOME."""
    try:
        path.stat()
    except OSError:
        return False
    return True


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        tag = tag_of(value) if kind is yaml.ScalarNode and implicit[0] else TAG + "str"
        return tag if tag != TAG + "str" else str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Its other styles do not give back every line break and control character (U+0085 for one).
    return dumper.represent_scalar(TAG + "str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


# --- items → Config -----------------------------------------------------------------------------


def _resolve(reading: Reading, check_secrets: bool) -> Config:
    """Merge, expand, fit and validate; one ConfigError with all that is wrong."""
    merged = LocatedValue(SourceLocation(0, 0, "defaults"), {})
    for layer in reading.layers:
        written, whole = _spelled_out(layer)
        merged = replace(merged, value={key: item for key, item in merged.value.items() if key not in whole})
        merged = _merge(merged, written)
    merged = _with_own_model(merged)
    fitting = _Fitting(check_secrets)
    values = fitting.section(merged, Config, "")
    errors = reading.errors + fitting.errors
    config = None
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        errors += _reworded(error, merged, fitting.broken)
    if config is not None and not errors:
        return config
    lines = list(dict.fromkeys(_line(place, message) for place, message in sorted(errors)))
    if len(lines) == 1:
        raise ConfigError(lines[0])
    raise ConfigError(f"{len(lines)} errors in the configuration:\n  " + "\n  ".join(lines))


def _line(place: SourceLocation, message: str) -> str:
    """`--set slurm.nodes=0` names its key already."""
    key, _, rest = message.partition(": ")
    line = f"{place.label}: {rest if place.label.startswith(f'--set {key}=') else message}"
    return cut(line, 1000)


def _merge(low: LocatedValue, high: LocatedValue) -> LocatedValue:
    """Mappings merge key by key, and an empty one (`slurm:` with nothing under it) changes nothing."""
    if isinstance(low.value, dict) and high.value is None:
        return low
    if not (isinstance(low.value, dict) and isinstance(high.value, dict)):
        return high
    merged = dict(low.value)
    for key, item in high.value.items():
        merged[key] = _merge(merged[key], item) if key in merged else item
    return LocatedValue(high.place, merged)


def _spelled_out(item: LocatedValue) -> tuple[LocatedValue, set[str]]:
    """`trainer: a:b` as `trainer: {function: a:b}`, and the sections for which that was done: it stands for all of
    what lower layers have said of them."""
    if not isinstance(item.value, dict):
        return item, set()
    values, whole = dict(item.value), set()
    for name, child in item.value.items():
        inner = section_type(Config, name) if name in Config.model_fields else None
        if (
            inner is not None
            and inner.shorthand
            and child.value is not None
            and not isinstance(child.value, (dict, list))
        ):
            values[name] = LocatedValue(child.place, {inner.shorthand: child})
            whole.add(name)
    return replace(item, value=values), whole


def _with_own_model(merged: LocatedValue) -> LocatedValue:
    """`model: {_target_: a:b, width: 3}` as `{target: a:b, kwargs: {width: 3}}`; vocab_size is both, if it is written."""
    model = merged.value.get("model")
    if model is None or not isinstance(model.value, dict) or nemo.TARGET not in model.value:
        return merged
    given = {name: item for name, item in model.value.items() if name != nemo.TARGET}
    section = {"target": model.value[nemo.TARGET], "kwargs": LocatedValue(model.place, given)}
    section |= {"vocab_size": given["vocab_size"]} if "vocab_size" in given else {}
    return replace(merged, value={**merged.value, "model": replace(model, value=section)})


class _Fitting:
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
        if "${" not in item.text or not isinstance(item.value, str) or key.startswith(_SHELL):
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

        text = _REFERENCE.sub(value_of, item.text)
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


def _reworded(error: ValidationError, merged: LocatedValue, broken: set[str]) -> list[tuple[SourceLocation, str]]:
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


def _escaped(value: Any, key: str) -> Any:
    """Plain values for `dump`: text that is no reference must not be read as one."""
    if isinstance(value, dict):
        return {name: _escaped(child, f"{key}.{name}") for name, child in value.items()}
    if isinstance(value, list):
        return [_escaped(child, key) for child in value]
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, str) and not key.startswith((_SHELL, REFERENCES)):
        return value.replace("${", "$${")
    return value
