"""The code in figures: few packages, small modules, short functions. (Who imports whom: import-linter, `make lint`.)"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import raylaunch

PACKAGE = Path(raylaunch.__file__).parent
ENTRIES, LINES, FUNCTION_LINES = 15, 400, 60


def modules() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(PACKAGE / "trainers").rglob("*.py")])


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def test_few_entries_at_the_top() -> None:
    entries = [p.name for p in PACKAGE.iterdir() if p.name not in {"__init__.py", "__pycache__"}]
    assert len(entries) <= ENTRIES, sorted(entries)


def test_every_folder_is_a_package_that_says_what_it_is() -> None:
    for folder in {path.parent for path in modules()} - {PACKAGE / "trainers"}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_no_module_is_long() -> None:
    found = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in modules()}
    assert len(found) > 250
    assert not {name: lines for name, lines in found.items() if lines > LINES}


def test_no_function_is_long() -> None:
    found = {f"{path.relative_to(PACKAGE)}: {name}": lines for path in modules() for name, lines in functions(path)}
    assert len(found) > 2000
    assert not {name: lines for name, lines in found.items() if lines > FUNCTION_LINES}


def test_a_class_has_its_name_alone() -> None:
    """But for decisions that two pure policies share in kind."""
    names = Counter(
        node.name
        for path in modules()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name for name, count in names.items() if count > 1} <= {"Drain", "Hold", "Leave"}


def test_a_module_has_its_name_alone() -> None:
    """But for a command and what it calls, the schema's sections, and the two policies."""
    rest = [path for path in modules() if path.name != "__init__.py" and path.parent.name not in {"cli", "schema"}]
    names = Counter(path.stem for path in rest)
    assert {name for name, count in names.items() if count > 1} <= {"policy"}
