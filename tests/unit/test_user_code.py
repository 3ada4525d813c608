"""What `trainer:` and `model._target_` name: the user's module where they have one, else ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import raylaunch
from raylaunch.config import user_code
from raylaunch.config.schema import TrainerConfig
from raylaunch.errors import RunError

CHECKOUT = str(Path(raylaunch.__file__).resolve().parents[1])
MINE = "def train(config, session):\n    return 'mine'\n"


@pytest.fixture(autouse=True)
def own_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees what another one has imported; none leaves a path behind."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != CHECKOUT])
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture(params=["wheel", "editable"])
def user(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The user's directory. An editable install has our checkout, and so our `trainers/`, on sys.path."""
    if request.param == "editable":
        sys.path.append(CHECKOUT)
    return tmp_path


def write(path: Path, text: str = MINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def called(function: str, user: Path) -> Any:
    return user_code.function(TrainerConfig(function=function, chdir=str(user)))(None, None)


def module(function: str, user: Path) -> str:
    return user_code.module(TrainerConfig(function=function, chdir=str(user))).__name__


@pytest.mark.parametrize("package", [True, False], ids=["package", "folder"])
@pytest.mark.parametrize("name", ["trainers", "sbatch"])
def test_a_users_package_may_be_called_as_ours(user: Path, name: str, package: bool) -> None:
    write(user / name / "mine.py")
    if package:
        write(user / name / "__init__.py", "")
    assert called(f"{name}.mine:train", user) == "mine"


@pytest.mark.parametrize("package", [True, False], ids=["package", "folder"])
def test_the_users_module_comes_before_ours_of_that_name(user: Path, package: bool) -> None:
    write(user / "trainers" / "nonfinite.py")
    if package:
        write(user / "trainers" / "__init__.py", "")
    assert called("trainers.nonfinite:train", user) == "mine"


@pytest.mark.parametrize("package", [True, False], ids=["package", "folder"])
def test_what_the_users_package_lacks_is_ours(user: Path, package: bool) -> None:
    write(user / "trainers" / "mine.py")
    if package:
        write(user / "trainers" / "__init__.py", "")
    assert module("trainers.nonfinite:Guard", user) == "raylaunch.trainers.nonfinite"


def test_a_users_package_elsewhere_on_the_path_counts(user: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    installed = tmp_path_factory.mktemp("site-packages")
    write(installed / "trainers" / "__init__.py", "")
    write(installed / "trainers" / "nonfinite.py")
    sys.path.insert(0, str(installed))
    assert called("trainers.nonfinite:train", user) == "mine"


def test_our_trainers_are_imported_once(user: Path) -> None:
    assert module("trainers.nonfinite:Guard", user) == module("raylaunch.trainers.nonfinite:Guard", user)
    assert "trainers.nonfinite" not in sys.modules


def test_a_checkout_may_be_the_users_directory() -> None:
    assert module("trainers.nonfinite:Guard", Path(CHECKOUT)) == "raylaunch.trainers.nonfinite"


def test_the_users_directory_comes_first(user: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    write(other / "named_alike.py", "train = None\n")
    write(user / "named_alike.py")
    sys.path.insert(0, str(other))
    sys.path.append(str(user))
    assert called("named_alike:train", user) == "mine"
    assert sys.path[0] == str(user) and sys.path.count(str(user)) == 1


def test_a_module_that_nobody_has_is_named_as_it_was_written(user: Path) -> None:
    with pytest.raises(RunError, match=r"trainer: cannot import trainers\.nothing: ModuleNotFoundError"):
        called("trainers.nothing:train", user)


def test_a_module_below_a_module_of_ours_is_not_ours(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "raylaunch.trainers.batches", raising=False)  # another test may have imported it
    write(user / "trainers" / "data" / "__init__.py", "")
    write(user / "trainers" / "data" / "mine.py")
    assert called("trainers.data.mine:train", user) == "mine"
    assert "raylaunch.trainers.batches" not in sys.modules
