"""The rows of tests/chaos/without.py still mean something: a change of the code or a renamed test does not empty them."""

from __future__ import annotations

import ast
import re

import pytest
from without import ROOT, SWITCHES, Switch


def functions(module: str) -> list[ast.FunctionDef]:
    tree = ast.parse((ROOT / f"tests/chaos/test_{module}.py").read_text())
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_names_are_distinct() -> None:
    assert len({switch.name for switch in SWITCHES}) == len(SWITCHES)


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.name)
def test_the_edit_can_be_made(switch: Switch) -> None:
    assert (ROOT / switch.file).read_text().count(switch.old) == 1, f"{switch.file}: {switch.old!r}"
    assert switch.old != switch.new


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.name)
def test_the_tests_exist(switch: Switch) -> None:
    """A name may be the first words of one, since pytest's -k finds it by them."""
    assert switch.tests
    for test in switch.tests:
        module, name, cases = re.fullmatch(r"(\w+)::(test_\w+)(?:\[(.+)\])?", test).groups()  # type: ignore[union-attr]
        found = [function for function in functions(module) if name in function.name]
        assert len(found) == 1, f"{test}: {len(found)} tests"
        decorators = " ".join(map(ast.unparse, found[0].decorator_list))
        assert all(case in decorators for case in (cases or "").split("-")), f"{test}: no such case"
