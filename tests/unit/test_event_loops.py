"""No file work in the event loops that answer pings: storage that stalls must not look like a dead node.

The check reads the source: in each coroutine, and in each plain function that one calls, no file is touched unless
the function is handed to a thread (`asyncio.to_thread(f, …)`, `off_loop(f, …)`). A call is followed when the name says
whose it is: a function of the module or of an imported module of ours, a method of `self`, a class, or a method
whose name only one class of ours has.
"""

from __future__ import annotations

import ast
import asyncio
import asyncio.subprocess
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import raylaunch

PACKAGE = Path(raylaunch.__file__).parent
FUNCTIONS = {
    "open", "print", "os.open", "os.read", "os.write", "os.stat", "os.listdir", "os.scandir", "os.unlink", "os.remove", "os.rename",
    "os.replace", "os.makedirs", "os.mkdir", "os.fsync", "os.path.exists", "shutil.rmtree", "shutil.copy", "shutil.which",
    "shutil.disk_usage", "subprocess.run", "subprocess.Popen", "subprocess.check_output", "time.sleep",
}  # fmt: skip
METHODS = {
    "open", "read_text", "write_text", "read_bytes", "write_bytes", "exists", "is_file", "is_dir", "is_symlink", "stat",
    "lstat", "glob", "rglob", "iterdir", "unlink", "mkdir", "rmdir", "rename", "touch", "chmod", "hardlink_to", "symlink_to",
    "resolve", "samefile",
}  # fmt: skip
"""Of pathlib.Path, and of nothing else here."""
ELSEWHERE = ("cli/", "observe/")
"""Event loops of other processes: they answer no pings."""
UNUSED = ("config/convert/", "data/", "tools/chaos/", "tools/plan/", "tools/sandbox/")
"""Rooms without an event loop, which agents do not use: left out for speed."""
EVERYBODYS = {
    name
    for kind in (str, bytes, list, dict, set, int, Path, asyncio.Event, asyncio.Queue, asyncio.Task, asyncio.StreamWriter,
                 asyncio.StreamReader, asyncio.Server, asyncio.subprocess.Process, logging.Logger, threading.Thread)
    for name in dir(kind)
}  # fmt: skip
"""Names of methods that do not say whose they are."""


@dataclass(frozen=True)
class Call:
    name: str
    line: int
    awaited: bool


@dataclass(frozen=True)
class Function:
    """One function of ours, and what it calls."""

    module: str
    owner: str
    is_async: bool
    calls: tuple[Call, ...]


class Source:
    """All functions of a package, and who calls whom. `files`: module → text."""

    def __init__(self, files: dict[str, str]) -> None:
        self.functions: dict[str, Function] = {}
        self._imports: dict[str, dict[str, str]] = {}
        self._methods: dict[str, list[str]] = {}
        self._working: dict[str, bool] = {}
        for module, text in files.items():
            self._read(module, ast.parse(text))

    def _read(self, module: str, tree: ast.Module) -> None:
        known = self._imports[module] = {}
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "raylaunch":
                for alias in node.names:
                    known[alias.asname or alias.name] = f"{node.module}.{alias.name}".removeprefix("raylaunch.")
            elif isinstance(node, DEFINED):
                self._add(module, "", node)
            elif isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, DEFINED):
                        self._methods.setdefault(item.name, []).append(self._add(module, node.name, item))

    def _add(self, module: str, owner: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
        key = ".".join(filter(None, (module, owner, node.name)))
        self.functions[key] = Function(module, owner, isinstance(node, ast.AsyncFunctionDef), tuple(_calls(node)))
        return key

    def _called(self, function: Function, name: str) -> str | None:
        """The key of what is called by this name in that function; None when it is not ours."""
        first, _, rest = name.partition(".")
        full = f"{function.module}.{name}"
        if first in {"self", "cls"} and rest:
            full = f"{function.module}.{function.owner}.{rest}"
        elif first in self._imports[function.module]:
            full = f"{self._imports[function.module][first]}.{rest}".strip(".")
        last = name.rpartition(".")[2]
        is_own = first == "self" and name.count(".") == 1
        only = self._methods.get(last, []) if "." in name and last not in EVERYBODYS and not is_own else []
        return next(
            (key for key in (full, f"{full}.__init__") if key in self.functions), only[0] if len(only) == 1 else None
        )

    def file_work(self, key: str) -> list[str]:
        """How this function comes to file work: one line for each way."""
        function = self.functions[key]
        return [f"{key}, line {call.line}: {call.name}" for call in function.calls if self._works(function, call)]

    def _works(self, function: Function, call: Call) -> bool:
        called = self._called(function, call.name)
        if called is None:
            method = "." in call.name and call.name.rpartition(".")[2] in METHODS
            return call.name in FUNCTIONS or (method and not call.awaited)
        if self.functions[called].is_async:
            return False
        if called not in self._working:
            self._working[called] = False  # while it is looked at: it may call itself
            self._working[called] = bool(self.file_work(called))
        return self._working[called]


DEFINED = (ast.FunctionDef, ast.AsyncFunctionDef)


def _calls(node: ast.AST) -> Iterator[Call]:
    """The calls in a function's own body; what it defines inside is called by somebody else."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*DEFINED, ast.Lambda)):
            continue
        if isinstance(child, ast.Call):
            yield Call(_name(child.func), child.lineno, isinstance(node, ast.Await))
        yield from _calls(child)


def _name(function: ast.expr) -> str:
    """What is called, with dots; "?" for what is no name."""
    if isinstance(function, ast.Attribute):
        return f"{_name(function.value)}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else "?"


def in_loops(files: dict[str, str]) -> list[str]:
    source = Source(files)
    return [way for key, function in source.functions.items() if function.is_async for way in source.file_work(key)]


def ours() -> dict[str, str]:
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    return {
        name.removesuffix(".py").replace("/", "."): path.read_text()
        for name, path in files.items()
        if not name.startswith(ELSEWHERE + UNUSED)
    }


def test_no_file_work_in_event_loops() -> None:
    assert in_loops(ours()) == [], "hand these to asyncio.to_thread"


AGENT = """
from raylaunch import state
from raylaunch.node import Node

def read(path):
    return path.read_text()

class Agent:
    def stop(self):
        self.write()
    def write(self):
        state.write_json(self.path, {})
    async def live(self):
        BODY
"""
NODE = """
class Node:
    def __init__(self, path):
        self.size = path.stat().st_size
    def last_words(self):
        return self.path.read_text()
"""
STATE = """
def write_json(path, value):
    path.write_text(value)
"""


@pytest.mark.parametrize(
    "body",
    [
        "(here / 'log').open('ab')", "open('log')", "read(path)", "self.stop()", "Node(path)", "self.node.last_words()",
        "state.write_json(path, 1)", "await asyncio.to_thread(print, path.read_text())", "if path.exists(): pass",
    ],
)  # fmt: skip
def test_what_it_finds(body: str) -> None:
    files = {"agent": AGENT.replace("BODY", body), "node": NODE, "state": STATE}
    assert len(in_loops(files)) == 1


@pytest.mark.parametrize(
    "body",
    [
        "await asyncio.to_thread(read, path)", "await asyncio.to_thread(self.stop)", "await asyncio.to_thread(Node, path)",
        "await self.duties.open()", "self.names.index(1)", "later(lambda: read(path))",
    ],
)  # fmt: skip
def test_what_it_leaves_alone(body: str) -> None:
    assert in_loops({"agent": AGENT.replace("BODY", body), "node": NODE, "state": STATE}) == []
