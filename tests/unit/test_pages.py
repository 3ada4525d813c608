"""The generated pages: docs/configuration.md is the schema, docs/cli.md the commands, docs/events.md the
kinds of events; each key has an example that works, each field of an event a meaning."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import raylaunch
from raylaunch.config import loader, schema
from raylaunch.config.schema import Config, Section

COMPANIONS = {
    "model.n_experts_per_token": ["model.n_experts=2"],
    "model.lora.rank": ["model.hf=a/b"],
    "model.kwargs": ["model.target=a.b:c"],
    "model.n_heads": ["model.dim=768"],
    "distributed.ep_size": ["model.n_experts=4"],
    "elastic.max_nodes": ["slurm.nodes=2"],
}
"""What an example needs beside it."""


def page(name: str) -> ModuleType:
    path = Path(raylaunch.__file__).parents[1] / "docs" / f"make_{name}.py"
    spec = importlib.util.spec_from_file_location(f"make_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys(kind: type[Section] = Config, path: str = "") -> Iterator[tuple[str, type[Section], str]]:
    for name in kind.model_fields:
        inner = schema.section_type(kind, name)
        if inner is None:
            yield f"{path}{name}", kind, name
        else:
            yield from keys(inner, f"{path}{name}.")


@pytest.mark.parametrize("name", ["configuration", "cli", "events"])
def test_the_page_is_what_would_be_made(name: str) -> None:
    """`python docs/make_NAME.py` writes it anew."""
    made = page(name)
    assert made.TARGET.read_text() == made.text()


@pytest.mark.parametrize(
    ("key", "kind", "name"), list(keys()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_key_has_a_description_and_an_example_that_works(key: str, kind: type[Section], name: str) -> None:
    made = page("configuration")
    text, example = made.described(made.field_notes(kind).get(name, ""))
    assert text.endswith(".") and text[0] not in "abcdefghijklmnopqrstuvwxyz" and example, (
        f"{key}: {text!r} {example!r}"
    )
    loader.load(None, [*COMPANIONS.get(key, []), f"{key}={example}"], user_file=None)
