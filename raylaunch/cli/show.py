"""Terminal output: a live line on a terminal, plain lines elsewhere. All of it on standard error, so
that standard output is for what a script would read."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import click
from rich.console import Console
from rich.status import Status


class LiveLine:
    """One line that changes; where there is no terminal, a line per change."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._live: Status | None = None
        self._last = ""
        self._began = time.monotonic()

    def __enter__(self) -> LiveLine:
        if self._console.is_terminal:
            self._live = self._console.status("")
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, text: str) -> None:
        seconds = time.monotonic() - self._began
        if self._live is not None:
            self._live.update(f"{text}  [dim]{seconds:.0f} s[/dim]")
        elif text != self._last:
            click.echo(f"[{seconds:5.1f} s] {text}", err=True)
        self._last = text


def note(text: str) -> None:
    """A line for people."""
    click.echo(text, err=True)


def table_width() -> int:
    """Columns of the terminal, or plenty for a pipe."""
    return Console().width if sys.stdout.isatty() else 200
