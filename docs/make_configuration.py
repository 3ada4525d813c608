"""Write docs/configuration.md from the schema in raylaunch/config/schema/; a test holds the two together."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from raylaunch.config import schema
from raylaunch.config.schema import Config, Section

TARGET = Path(__file__).with_name("configuration.md")


def field_notes(section: type[Section]) -> dict[str, str]:
    """The docstring under each field."""
    body = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(body, ast.ClassDef)
    notes: dict[str, str] = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            assert isinstance(after.value, ast.Constant)
            notes[field.target.id] = " ".join(str(after.value.value).split())
    return notes


def section(path: str, kind: type[Section]) -> list[str]:
    """The table of a section, then those of the sections in it."""
    title = f"{inspect.getdoc(kind)}".split(":", 1)[-1].strip().strip("`: ").capitalize()
    lines = ["", f"## `{path}:`", "", title, "", "| key | default | |", "| --- | --- | --- |"]
    notes = field_notes(kind)
    inner = []
    for key, item in kind.model_fields.items():
        nested = schema.section_type(kind, key)
        if nested is not None:
            lines.append(f"| `{key}` | | see `{path}.{key}:` |")
            inner += section(f"{path}.{key}", nested)
            continue
        default = item.get_default(call_default_factory=True)
        lines.append(f"| `{key}` | `{default}` | {notes.get(key, '').replace('|', chr(92) + '|')} |")
    return [*lines, *inner]


def text() -> str:
    lines = [
        "# Configuration", "",
        "All keys, with their defaults. Made from `raylaunch/config/schema/` by `python docs/make_configuration.py`.", "",
        "Sizes that `model.size` names: " + ", ".join(
            f"`{name}` (dim {s['dim']}, {s['n_layers']} layers)" for name, s in schema.SIZES.items()
        ) + ".",
    ]  # fmt: skip
    for name, field in Config.model_fields.items():
        kind = schema.section_type(Config, name)
        if kind is not None:
            lines += section(name, kind)
            continue
        note = field_notes(Config).get(name, "")
        lines += ["", f"## `{name}`", "", f"{note} Default: `{field.default}`."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text())
