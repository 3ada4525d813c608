"""What is imported when a process starts (who may import whom is import-linter's: `make lint`), and former names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import raylaunch
from raylaunch.cli import COMMANDS

PACKAGE = Path(raylaunch.__file__).parent
HEAVY = {"ray", "torch", "pyarrow", "numpy", "pydantic", "yaml", "rich", "jinja2", "psutil"}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def beside_trainers() -> list[Path]:
    ours = (PACKAGE / "trainers").resolve()
    return [path for path in PACKAGE.rglob("*.py") if ours not in path.resolve().parents]


def test_our_trainers_have_one_name() -> None:
    """A module that is imported as `trainers.x` and as `raylaunch.trainers.x` exists twice, with classes of its own."""
    root = PACKAGE.parent
    files = [
        path for name in ("trainers", "tests", "benchmarks", "docs", "examples") for path in (root / name).rglob("*.py")
    ]
    assert len(files) > 100
    twice = [path for path in [*files, *beside_trainers()] if "trainers" in imported(path)]
    assert not twice, f"raylaunch.trainers is the name: {twice}"


def modules_after(code: str) -> set[str]:
    shown = subprocess.run(
        [sys.executable, "-c", f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\nprint(*sys.modules, file=sys.stderr)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {name.split(".")[0] for name in shown.stderr.split()}


def test_the_training_loop_imports_neither_ray_nor_torch() -> None:
    assert (
        modules_after("import raylaunch.training.training_loop, raylaunch.training.driver")
        & {"ray", "torch", "pyarrow", "numpy"}
        == set()
    )


def test_help_imports_click_and_nothing_heavy() -> None:
    code = "sys.argv = ['raylaunch', '--help']; from raylaunch.cli import main; main()"
    assert modules_after(code) & HEAVY == set()


def test_commands_import_neither_ray_nor_torch_nor_pyarrow() -> None:
    code = (
        "import importlib; from raylaunch.cli import COMMANDS;"
        " [importlib.import_module(target.split(':')[0]) for target, _ in COMMANDS.values()]"
    )
    assert modules_after(code) & {"ray", "torch", "pyarrow", "numpy"} == set()


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help(command: str) -> None:
    from click.testing import CliRunner

    from raylaunch.cli import cli

    shown = CliRunner().invoke(cli, [*command.split(), "--help"])
    assert shown.exit_code == 0 and "Usage:" in shown.output


def test_every_example_in_the_documentation_is_a_config(tmp_path: Path) -> None:
    from raylaunch.config import loader

    blocks = [
        block
        for page in (PACKAGE.parent / "docs").glob("*.md")
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    ]
    assert len(blocks) >= 7
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        loader.load(path, user_file=None)
