"""Reading configuration: defaults < user file < given file < flags < `--set a.b=c`.

YAML text → `LocatedValue` trees that know where each value was written → merged (mappings merge, all else
replaces) → `${NAME}` expanded → fitted to the schema → validated → `Config`. All that is wrong is
collected and raised as one ConfigError, a line each: `file:line: key: what is allowed`.
It refuses: unknown and duplicate keys, conversions that guess (`yes`, base-60 numbers, dates), and
environment variables anywhere but where `${NAME}` is written.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr, ValidationError

from raylaunch.config import former_names
from raylaunch.config.convert import nemo
from raylaunch.config.fitting import REFERENCE, SHELL, Fitting, reworded
from raylaunch.config.schema import Config, section_type
from raylaunch.config.yaml_items import (
    REFERENCES,
    TAG,
    LocatedValue,
    Reading,
    SourceLocation,
    cut,
    from_python,
    nest,
    tag_of,
)
from raylaunch.errors import ConfigError

USER_FILE = Path("~/.config/raylaunch/config.yaml")
"""Stands for the user's own file; $XDG_CONFIG_HOME is looked at when loading."""


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
    here (see `nemo`), and for each key that has another name now. Raises ConfigError with everything that is wrong, UsageError
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
    return _resolve(reading, tell, check_secrets=True)


def load_resolved(path: Path) -> Config:
    """A file that `dump` wrote: no user file, and the variables of slurm.env need not be set here."""
    reading = Reading()
    reading.file(2, path)
    return _resolve(reading, lambda _: None, check_secrets=False)


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
    for match in REFERENCE.finditer(value):
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


def _resolve(reading: Reading, tell: Callable[[str], None], *, check_secrets: bool) -> Config:
    """Merge, expand, fit and validate; one ConfigError with all that is wrong."""
    merged = LocatedValue(SourceLocation(0, 0, "defaults"), {})
    for layer in reading.layers:
        written, whole = _spelled_out(_with_names_of_now(layer, reading, tell))
        merged = replace(merged, value={key: item for key, item in merged.value.items() if key not in whole})
        merged = _merge(merged, written)
    merged = _with_own_model(merged)
    fitting = Fitting(check_secrets)
    values = fitting.section(merged, Config, "")
    errors = reading.errors + fitting.errors
    config = None
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        errors += reworded(error, merged, fitting.broken)
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


def _with_names_of_now(layer: LocatedValue, reading: Reading, tell: Callable[[str], None]) -> LocatedValue:
    """Former keys under the names that they have now (see `former_names`)."""
    sections = dict(layer.value or {})
    for key, now in former_names.KEYS.items():
        section, _, former = key.partition(".")
        item = sections.get(section)
        if item is None or not isinstance(item.value, dict) or former not in item.value:
            continue
        given = item.value[former]
        if now in item.value:
            reading.errors.append((given.place, f"{key}: the former name of {section}.{now}, which is given, too"))
        else:
            tell(f"{given.place.label}: {key} is {section}.{now} now")
        sections[section] = replace(
            item, value={now if name == former else name: child for name, child in item.value.items()}
        )
    return replace(layer, value=sections) if sections else layer


def _with_own_model(merged: LocatedValue) -> LocatedValue:
    """`model: {_target_: a:b, width: 3}` as `{target: a:b, kwargs: {width: 3}}`; vocab_size is both, if it is written."""
    model = merged.value.get("model")
    if model is None or not isinstance(model.value, dict) or nemo.TARGET not in model.value:
        return merged
    given = {name: item for name, item in model.value.items() if name != nemo.TARGET}
    section = {"target": model.value[nemo.TARGET], "kwargs": LocatedValue(model.place, given)}
    section |= {"vocab_size": given["vocab_size"]} if "vocab_size" in given else {}
    return replace(merged, value={**merged.value, "model": replace(model, value=section)})


def _escaped(value: Any, key: str) -> Any:
    """Plain values for `dump`: text that is no reference must not be read as one."""
    if isinstance(value, dict):
        return {name: _escaped(child, f"{key}.{name}") for name, child in value.items()}
    if isinstance(value, list):
        return [_escaped(child, key) for child in value]
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, str) and not key.startswith((SHELL, REFERENCES)):
        return value.replace("${", "$${")
    return value
