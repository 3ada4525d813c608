"""Write docs/configuration.md from the schema in raylaunch/config/schema/; a test holds the two together."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import yaml

from raylaunch.config import schema
from raylaunch.config.schema import Config, Section

TARGET = Path(__file__).with_name("configuration.md")


def field_notes(kind: type) -> dict[str, str]:
    """The docstring under each field of a class."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    notes: dict[str, str] = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            assert isinstance(after.value, ast.Constant)
            notes[field.target.id] = " ".join(str(after.value.value).split())
    return notes


def described(note: str) -> tuple[str, str]:
    """A field's docstring: its description, and its example in YAML."""
    text, _, example = note.partition(" Example: `")
    return text, example.removesuffix("`.")


def in_yaml(value: object) -> str:
    """A default as one writes it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=2**31, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").removesuffix("\n...")


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def section(path: str, kind: type[Section]) -> list[str]:
    """The table of a section, then those of the sections in it."""
    title = f"{inspect.getdoc(kind)}".partition(":` ")[2].replace("\n", " ")
    title = title[:1].upper() + title[1:]
    lines = ["", f"## `{path}:`", "", title, "", "| key | type | default | description | example |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    notes = field_notes(kind)
    inner = []
    for key, item in kind.model_fields.items():
        nested = schema.section_type(kind, key)
        if nested is not None:
            lines.append(f"| `{key}` | section | | See `{path}.{key}:`. | |")
            inner += section(f"{path}.{key}", nested)
            continue
        text, example = described(notes[key])
        kind_of_value = str(schema.FieldType.of(kind, key)).removesuffix(" or null")
        default = in_yaml(item.get_default(call_default_factory=True))
        lines.append(f"| `{key}` | {cell(kind_of_value)} | `{default}` | {cell(text)} | `{cell(example)}` |")
    return [*lines, *inner]


def text() -> str:
    sizes = (f"`{name}` (dim {s['dim']}, {s['n_layers']} layers)" for name, s in schema.SIZES.items())
    lines = [
        "# Configuration", "",
        "All keys of a raylaunch configuration file. This page is generated from `raylaunch/config/schema/` by",
        "`python docs/make_configuration.py`. Former names of keys are still accepted, with a note that gives the new name.", "",
        "Named shapes for `model.size`: " + ", ".join(sizes) + ".",
    ]  # fmt: skip
    for name in Config.model_fields:
        kind = schema.section_type(Config, name)
        assert kind is not None
        lines += section(name, kind)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text())
