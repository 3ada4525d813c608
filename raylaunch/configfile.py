"""Reading configuration: defaults < user file < given file < flags < `--set a.b=c`.

YAML text → `Item` trees that know where each value was written → merged (mappings merge, all else
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from raylaunch.config import Config, Kind, Section, section_type
from raylaunch.errors import ConfigError, UsageError

USER_FILE = Path("~/.config/raylaunch/config.yaml")
"""Stands for the user's own file; $XDG_CONFIG_HOME is looked at when loading."""

_BYTES_MAX = 1 << 20
_DEPTH_MAX = 6  # the schema has four levels; what lies deeper (or an alias to itself) is wrong anyway
_REFERENCE = re.compile(r"\$\$\{|\$\{([^}]*)\}?")
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SHELL = "slurm.setup"  # lines of shell: `${NAME}` in them is the shell's, on the node
_SECRETS = "slurm.env"  # stays as references, and its values are never printed

_TAG = "tag:yaml.org,2002:"
_SCALARS: tuple[tuple[str, str], ...] = (
    # YAML 1.2's core schema: 1e-3 is a number; yes, 1:30:00 and 2024-01-01 are text.
    ("null", "|~|null|Null|NULL"),
    ("bool", "true|True|TRUE|false|False|FALSE"),
    ("int", "[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    ),
)


class Place(NamedTuple):
    """Where something was written. Sorts by layer, then line."""

    layer: int
    line: int
    label: str
    """What a message begins with: `file:line`, `--set a.b=c` or `command line`."""


@dataclass(frozen=True)
class Item:
    """A value and where it was written: a scalar, a list of items, or a mapping of items."""

    place: Place
    value: Any
    text: str = ""
    """A scalar as it was written."""
    plain: bool = False
    """Written without quotes, so that its text decides its type."""
    literal: bool = False
    """From a flag: the shell has expanded it already."""
    broken: bool = False
    """Reported already."""


def load(
    path: Path | None,
    sets: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    user_file: Path | None = USER_FILE,
) -> Config:
    """The configuration from all layers, later ones winning: user file, `path`, `overrides`, `sets`.

    `overrides` are flags by dotted key ("slurm.nodes"); None (or an empty tuple) is "not given".
    `sets` are `a.b=c` with c in YAML. Raises ConfigError with everything that is wrong, UsageError
    for a --set that cannot be read.
    """
    reading = _Reading()
    if user_file is USER_FILE:
        user_file = default_user_file()
    if user_file is not None and _is_there(user_file):
        reading.file(1, user_file)
    if path is not None:
        reading.file(2, path)
    for key, value in (overrides or {}).items():
        if value is not None and value != ():
            reading.layers.append(_nest(key, _from_python(value)))
    for text in sets:
        reading.set(text)
    return _resolve(reading, check_secrets=True)


def load_resolved(path: Path) -> Config:
    """A file that `dump` wrote: no user file, and the variables of slurm.env need not be set here."""
    reading = _Reading()
    reading.file(2, path)
    return _resolve(reading, check_secrets=False)


def dump(config: Config) -> str:
    """The complete YAML text, in the schema's order; it loads to an equal Config."""
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


# --- text → items -------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Composes only; scalars are resolved as in YAML 1.2."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return _tag_of(value)
        return str(super().resolve(kind, value, (False, True)))  # type: ignore[no-untyped-call]


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        tag = _tag_of(value) if kind is yaml.ScalarNode and implicit[0] else _TAG + "str"
        return tag if tag != _TAG + "str" else str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Its other styles do not give back every line break and control character (U+0085 for one).
    return dumper.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def _tag_of(text: str) -> str:
    """The tag of an unquoted scalar."""
    return next((_TAG + name for name, pattern in _SCALARS if re.fullmatch(pattern, text)), _TAG + "str")


def _scalar(tag: str, text: str) -> Any:
    """The Python value of a scalar; ValueError for another tag, or a number that is none."""
    match tag.removeprefix(_TAG):
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            bare = text.replace("_", "")
            if len(bare) > 1000:  # Python itself refuses some thousands, in words about sys
                raise ValueError("a number with more than 1000 digits")
            return int(bare, {"0x": 16, "0o": 8}.get(bare[:2], 10))
        case "float":
            return float(re.sub(r"\.(inf|nan)$", r"\1", text.replace("_", "").lower()))
        case "str":
            return text
    raise ValueError(f"the tag {tag.replace(_TAG, '!!')} is not supported")


class _Reading:
    """Reads layers, and collects what is wrong in them."""

    def __init__(self) -> None:
        self.layers: list[Item] = []
        self.errors: list[tuple[Place, str]] = []

    def file(self, layer: int, path: Path) -> None:
        """One file. Raises ConfigError when it cannot be read or is not YAML."""
        try:
            with path.open("rb") as source:
                raw = source.read(_BYTES_MAX + 1)
        except IsADirectoryError:
            raise ConfigError(f"{path}: is a directory", "Give the YAML file in it.") from None
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file", _similar_file(path)) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error
        if len(raw) > _BYTES_MAX:
            raise ConfigError(f"{path}: larger than 1 MiB, so hardly a configuration", "Check the path.")
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n") + 1
            hint = "Check the path, or save the file as UTF-8."
            raise ConfigError(f"{path}:{line}: not UTF-8 text", hint) from None
        item = self._compose(text, layer, str(path))
        if not isinstance(item.value, dict) and item.value is not None:
            raise ConfigError(
                f"{item.place.label}: the file must be a mapping of sections, got {_shown(item)}",
                f"Its sections are {', '.join(Config.model_fields)}; write 'slurm:' with keys under it.",
            )
        self.layers.append(item)

    def set(self, text: str) -> None:
        """`a.b=c`. Raises UsageError when it is not of that form."""
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise UsageError(f"--set {_cut(text)}: not of the form key=value", "For example --set slurm.nodes=4.")
        shown = f"{key}=..." if key.startswith(_SECRETS) else _cut(text)
        self.layers.append(_nest(key, self._compose(value, 4, "", f"--set {shown}")))

    def _compose(self, text: str, layer: int, name: str, label: str = "") -> Item:
        """YAML text as an item; places are `name:line`, or `label` where one is given."""
        kind = UsageError if label else ConfigError
        try:
            node = yaml.compose(text, Loader=_Loader)
        except RecursionError:
            raise kind(f"{label or name}: nested too deeply", "Check the brackets.") from None
        except yaml.YAMLError as error:
            line, what = _yaml_problem(error, text)
            hint = "Check the indentation, the brackets and the quotes there."
            if "\\t" in what:
                hint = "YAML indents with spaces, not tabs."
            elif "${" in "".join(text.splitlines()[line - 1 : line]):
                hint = 'Inside {...} and [...] write "${NAME}" in quotes.'
            raise kind(f"{label or f'{name}:{line}'}: not valid YAML: {what}", hint) from None
        place = Place(layer, 1, label or f"{name}:1")
        return Item(place, None) if node is None else self._item(node, place, name, _DEPTH_MAX)

    def _item(self, node: yaml.Node, place: Place, name: str, depth: int) -> Item:
        def place_of(other: yaml.Node) -> Place:
            line = other.start_mark.line + 1
            return Place(place.layer, line, f"{name}:{line}") if name else place

        if isinstance(node, yaml.ScalarNode):
            try:
                value = _scalar(node.tag, node.value)
            except ValueError as error:
                self.errors.append((place, str(error)))
                return Item(place, None, broken=True)
            plain = node.style is None and node.tag == _tag_of(node.value)
            return Item(place, value, node.value, plain)
        if depth == 0:
            return Item(place, [])
        if isinstance(node, yaml.SequenceNode):
            return Item(place, [self._item(child, place_of(child), name, depth - 1) for child in node.value])
        entries: dict[str, Item] = {}
        for key, child in node.value:
            at = place_of(key)
            if not isinstance(key, yaml.ScalarNode):
                self.errors.append((at, "a key must be a word, not a list or a mapping"))
            elif key.value in entries:
                first = entries[key.value].place.label
                self.errors.append((at, f"{key.value}: written twice in one mapping; first at {first}"))
            else:
                entries[key.value] = self._item(child, at, name, depth - 1)
        return Item(place, entries)


def _yaml_problem(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """Line and words of PyYAML's error."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        context = f" ({error.context})" if error.context and error.problem else ""
        return (mark.line + 1 if mark else 1), f"{error.problem or error.context}{context}"
    if isinstance(error, yaml.reader.ReaderError):
        return text[: error.position].count("\n") + 1, "a control character, as in a binary file"
    return 1, str(error)


def _similar_file(path: Path) -> str:
    """A hint for a file that is not there."""
    if not path.parent.is_dir():
        return f"The directory {path.parent} does not exist either."
    names = [p.name for p in path.parent.glob("*.y*ml")]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"Did you mean {path.parent / near[0]}?" if near else "Check the path."


def _from_python(value: Any) -> Item:
    """A flag's value."""
    place = Place(3, 0, "command line")
    if isinstance(value, Mapping):
        return Item(place, {str(k): _from_python(v) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return Item(place, [_from_python(v) for v in value])
    return Item(place, value, str(value).lower() if isinstance(value, bool) else str(value), literal=True)


def _nest(key: str, item: Item) -> Item:
    for part in reversed(key.split(".")):
        item = Item(item.place, {part: item})
    return item


# --- items → Config -----------------------------------------------------------------------------


def _resolve(reading: _Reading, check_secrets: bool) -> Config:
    """Merge, expand, fit and validate; one ConfigError with all that is wrong."""
    merged = Item(Place(0, 0, "defaults"), {})
    for layer in reading.layers:
        merged = _merge(merged, layer)
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


def _line(place: Place, message: str) -> str:
    """`--set slurm.nodes=0` names its key already."""
    key, _, rest = message.partition(": ")
    line = f"{place.label}: {rest if place.label.startswith(f'--set {key}=') else message}"
    return _cut(line, 1000)


def _merge(low: Item, high: Item) -> Item:
    """Mappings merge key by key, and an empty one (`slurm:` with nothing under it) changes nothing."""
    if isinstance(low.value, dict) and high.value is None:
        return low
    if not (isinstance(low.value, dict) and isinstance(high.value, dict)):
        return high
    merged = dict(low.value)
    for key, item in high.value.items():
        merged[key] = _merge(merged[key], item) if key in merged else item
    return Item(high.place, merged)


class _Fitting:
    """Items → plain values for pydantic, by the schema; collects what pydantic could not place."""

    def __init__(self, check_secrets: bool) -> None:
        self.errors: list[tuple[Place, str]] = []
        self.broken: set[str] = set()
        """Keys left out because they are wrong: validators over several keys must not judge them."""
        self._check_secrets = check_secrets

    def section(self, item: Item, model: type[Section], path: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, child in item.value.items():
            key = f"{path}.{name}" if path else name
            if name not in model.model_fields:
                self._bad(child, key, _unknown(name, model, path))
                continue
            kind = Kind.of(model, name)
            inner = section_type(model, name)
            if inner is None:
                value = self._value(child, kind, key)
                if key not in self.broken:
                    values[name] = value
            elif isinstance(child.value, dict):
                values[name] = self.section(child, inner, key)
            elif child.value is not None:
                self._bad(child, key, f"must be a section with keys under it, got {_shown(child)}")
        return values

    def _value(self, item: Item, kind: Kind, key: str) -> Any:
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

    def _expanded(self, item: Item, key: str) -> Item:
        """`${NAME}` replaced; in slurm.env only checked, so that no secret enters a file of ours."""
        if "${" not in item.text or not isinstance(item.value, str) or key.startswith(_SHELL):
            return item
        secret = key.startswith(_SECRETS)
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
        return replace(item, value=_scalar(_tag_of(text), text) if item.plain else text, text=text)

    def _bad(self, item: Item, key: str, message: str) -> None:
        self.errors.append((item.place, f"{key}: {message}"))
        self.broken.add(re.sub(r"\[\d+\]$", "", key))


def _unknown(name: str, model: type[Section], path: str) -> str:
    """What to write in place of a key that is not there."""
    known = list(model.model_fields)
    head, _, rest = name.partition(".")
    if not path and rest and head in known:
        return f"keys are nested in a file: write '{rest}:' under '{head}:'"
    elsewhere = [name] if path and name in Config.model_fields else []
    for section in Config.model_fields:
        inner = section_type(Config, section)
        elsewhere += [f"{section}.{name}"] if inner and name in inner.model_fields else []
    word = name.replace("-", "_").lower()
    close, near = (difflib.get_close_matches(word, known, n=1, cutoff=c) for c in (0.75, 0.6))
    if found := close or elsewhere or near:
        return f"unknown key; did you mean {' or '.join(found)}?"
    return f"unknown key; {path or 'the file'} has {', '.join(known)}"


def _reworded(error: ValidationError, merged: Item, broken: set[str]) -> list[tuple[Place, str]]:
    """pydantic's errors, one a key, as `key: what is allowed, what was given`."""
    found: dict[str, tuple[Place, str]] = {}
    for detail in error.errors(include_url=False):
        key, kind, item = _locate(detail["loc"], merged)
        own = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else ""
        if kind is None:  # a validator over several keys
            if not any(not key or b == key or b.startswith(f"{key}.") for b in broken):
                place = _blamed(own, item).place
                found.setdefault(key, (place, f"{key}: {own}" if key else own))
            continue
        shown = _shown(item, secret=key.startswith(_SECRETS))
        given = "" if detail["loc"][-1] == "[key]" else f", got {shown}{_advice(item, kind)}"
        found.setdefault(key, (item.place, f"{key}: {own or f'must be {kind}'}{given}"))
    return list(found.values())


def _locate(loc: Sequence[int | str], merged: Item) -> tuple[str, Kind | None, Item]:
    """pydantic's location → key, kind and item; its names for branches of a union are left out."""
    key, item = "", merged
    model: type[Section] | None = Config
    kind: Kind | None = None
    for part in loc:
        if model is not None and isinstance(part, str) and part in model.model_fields:
            key = f"{key}.{part}" if key else part
            item = item.value.get(part, Item(item.place, None))
            inner = section_type(model, part)
            kind = None if inner else Kind.of(model, part)
            model = inner
        elif kind is not None and isinstance(part, int) and isinstance(item.value, list):
            key, item, kind = f"{key}[{part}]", item.value[part], kind.element(list)
        elif kind is not None and isinstance(item.value, dict) and part in item.value:
            key, item, kind = f"{key}.{part}", item.value[part], kind.element(dict)
    return key, kind, item


def _blamed(message: str, item: Item) -> Item:
    """Of the keys that a message names, the one written last; else the section."""
    words = set(re.findall(r"\w+", message))
    owners = [item.value, *(c.value for c in item.value.values() if isinstance(c.value, dict))]
    named = [child for owner in owners for name, child in owner.items() if name in words]
    scalars = [child for child in named if not isinstance(child.value, dict)]
    return max(scalars, key=lambda child: child.place, default=item)


def _advice(item: Item, kind: Kind) -> str:
    """A correction, where one can be guessed."""
    if len(kind.choices) > 1 and item.text:
        near = difflib.get_close_matches(item.text, kind.choices, n=1, cutoff=0.5)
        return f"; did you mean {near[0]}?" if near else ""
    if kind.takes(list) and isinstance(item.value, str):
        return f"; write [{_cut(item.text)}]"
    word = item.text.lower()
    if kind.takes(bool) and word in {"yes", "on", "y", "1", "no", "off", "n", "0"}:
        return f"; write {'true' if word in {'yes', 'on', 'y', '1'} else 'false'}"
    if kind.takes(int) and isinstance(item.value, float) and item.value.is_integer() and abs(item.value) < 1e15:
        return f"; write {int(item.value)}"
    return ""


def _shown(item: Item, secret: bool = False) -> str:
    """A value for a message, short; a secret, or what a variable holds, is never shown."""
    if isinstance(item.value, dict):
        return "a mapping"
    if isinstance(item.value, list):
        return "a list" if item.value else "an empty list"
    if item.value is None:
        return "nothing"
    if secret:
        return "something else"
    if "${" in item.text.replace("$${", "") and not item.literal:
        return f"the value of {item.text}"
    return repr(_cut(item.text)) if isinstance(item.value, str) and not item.plain else _cut(item.text)


def _cut(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _escaped(value: Any, key: str) -> Any:
    """Plain values for `dump`: text that is no reference must not be read as one."""
    if isinstance(value, dict):
        return {name: _escaped(child, f"{key}.{name}") for name, child in value.items()}
    if isinstance(value, list):
        return [_escaped(child, key) for child in value]
    if isinstance(value, str) and not key.startswith((_SHELL, _SECRETS)):
        return value.replace("${", "$${")
    return value
