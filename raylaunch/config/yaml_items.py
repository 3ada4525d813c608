"""YAML text → `LocatedValue` trees that know where each value was written. What is wrong is collected.

It refuses: duplicate keys, conversions that guess (`yes`, base-60 numbers, dates), and what is no YAML.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from raylaunch.config.schema import Config
from raylaunch.errors import ConfigError, UsageError

BYTES_MAX = 1 << 20
DEPTH_MAX = 6  # the schema has four levels; what lies deeper (or an alias to itself) is wrong anyway

REFERENCES = "slurm.env"  # stays as references to variables
_HIDDEN = (REFERENCES, "alerts.slack", "alerts.webhook", "alerts.command")

TAG = "tag:yaml.org,2002:"
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


class SourceLocation(NamedTuple):
    """Where something was written. Sorts by layer, then line."""

    layer: int
    line: int
    label: str
    """What a message begins with: `file:line`, `--set a.b=c` or `command line`."""


@dataclass(frozen=True)
class LocatedValue:
    """A value and where it was written: a scalar, a list of items, or a mapping of items."""

    place: SourceLocation
    value: Any
    text: str = ""
    """A scalar as it was written."""
    plain: bool = False
    """Written without quotes, so that its text decides its type."""
    literal: bool = False
    """From a flag: the shell has expanded it already."""
    broken: bool = False
    """Reported already."""


class _Loader(yaml.SafeLoader):
    """Composes only; scalars are resolved as in YAML 1.2."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return tag_of(value)
        return str(super().resolve(kind, value, (False, True)))  # type: ignore[no-untyped-call]


def tag_of(text: str) -> str:
    """The tag of an unquoted scalar."""
    return next((TAG + name for name, pattern in _SCALARS if re.fullmatch(pattern, text)), TAG + "str")


def scalar(tag: str, text: str) -> Any:
    """The Python value of a scalar; ValueError for another tag, or a number that is none."""
    match tag.removeprefix(TAG):
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
    raise ValueError(f"the tag {tag.replace(TAG, '!!')} is not supported")


class Reading:
    """Reads layers, and collects what is wrong in them."""

    def __init__(self) -> None:
        self.layers: list[LocatedValue] = []
        self.errors: list[tuple[SourceLocation, str]] = []

    def file(self, layer: int, path: Path) -> None:
        """One file. Raises ConfigError when it cannot be read or is not YAML."""
        try:
            with path.open("rb") as source:
                raw = source.read(BYTES_MAX + 1)
        except IsADirectoryError:
            raise ConfigError(f"{path}: is a directory", "Give the YAML file in it.") from None
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file", _similar_file(path)) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error
        if len(raw) > BYTES_MAX:
            raise ConfigError(f"{path}: larger than 1 MiB: not a configuration", "Check the path.")
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n") + 1
            hint = "Check the path, or save the file as UTF-8."
            raise ConfigError(f"{path}:{line}: not UTF-8 text", hint) from None
        item = self._compose(text, layer, str(path))
        if not isinstance(item.value, dict) and item.value is not None:
            raise ConfigError(
                f"{item.place.label}: the file must be a mapping of sections, got {shown(item)}",
                f"Its sections are {', '.join(Config.model_fields)}; write 'slurm:' with keys under it.",
            )
        self.layers.append(item)

    def set(self, text: str) -> None:
        """`a.b=c`. Raises UsageError when it is not of that form."""
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise UsageError(f"--set {cut(text)}: not of the form key=value", "For example --set slurm.nodes=4.")
        words = f"{key}=..." if hidden(key, mapping="{" in value) else cut(text)
        self.layers.append(nest(key, self._compose(value, 4, "", f"--set {words}")))

    def _compose(self, text: str, layer: int, name: str, label: str = "") -> LocatedValue:
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
        place = SourceLocation(layer, 1, label or f"{name}:1")
        return LocatedValue(place, None) if node is None else self._item(node, place, name, DEPTH_MAX)

    def _item(self, node: yaml.Node, place: SourceLocation, name: str, depth: int) -> LocatedValue:
        def place_of(other: yaml.Node) -> SourceLocation:
            line = other.start_mark.line + 1
            return SourceLocation(place.layer, line, f"{name}:{line}") if name else place

        if isinstance(node, yaml.ScalarNode):
            try:
                value = scalar(node.tag, node.value)
            except ValueError as error:
                self.errors.append((place, str(error)))
                return LocatedValue(place, None, broken=True)
            plain = node.style is None and node.tag == tag_of(node.value)
            return LocatedValue(place, value, node.value, plain)
        if depth == 0:
            return LocatedValue(place, [])
        if isinstance(node, yaml.SequenceNode):
            return LocatedValue(place, [self._item(child, place_of(child), name, depth - 1) for child in node.value])
        entries: dict[str, LocatedValue] = {}
        for key, child in node.value:
            at = place_of(key)
            if not isinstance(key, yaml.ScalarNode):
                self.errors.append((at, "a key must be a word, not a list or a mapping"))
            elif key.value in entries:
                first = entries[key.value].place.label
                self.errors.append((at, f"{key.value}: written twice in one mapping; first at {first}"))
            else:
                entries[key.value] = self._item(child, at, name, depth - 1)
        return LocatedValue(place, entries)


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


def from_python(value: Any) -> LocatedValue:
    """A flag's value."""
    place = SourceLocation(3, 0, "command line")
    if isinstance(value, Mapping):
        return LocatedValue(place, {str(k): from_python(v) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return LocatedValue(place, [from_python(v) for v in value])
    return LocatedValue(place, value, str(value).lower() if isinstance(value, bool) else str(value), literal=True)


def nest(key: str, item: LocatedValue) -> LocatedValue:
    for part in reversed(key.split(".")):
        item = LocatedValue(item.place, {part: item})
    return item


def hidden(key: str, mapping: bool = False) -> bool:
    """Whether its values are never printed: they are secrets, or (of a `mapping`) may hold some."""
    return key == "alerts" or any(key.startswith(one) or (mapping and one.startswith(f"{key}.")) for one in _HIDDEN)


def shown(item: LocatedValue, secret: bool = False) -> str:
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
    return repr(cut(item.text)) if isinstance(item.value, str) and not item.plain else cut(item.text)


def cut(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
