"""Whatever happens to heads, each request is done once: histories of heads that die, freeze, and are replaced."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from made_heads import Place

from raylaunch.cluster.head import HeadController
from raylaunch.state import records, requests
from raylaunch.state.requests import RunAsk, StrikeAsk


class Killed(BaseException):
    """A head dies here."""


class History:
    """Heads of one cluster. Between any two steps of a head it may die, or be frozen while another one is elected and
    leads; then it thaws and goes on from where it was."""

    def __init__(self, directory: Path, moments: list[str]) -> None:
        self.place, self.moments, self.incarnation = Place(directory), list(moments), 0
        self.newest: HeadController | None = None
        """That has looked, and lives on."""

    def lead(self) -> HeadController:
        self.incarnation += 1
        return self.place.lead(self.incarnation)

    def turn(self, may_die: bool) -> None:
        """A head is elected and looks at the requests once. The newest one puts back what an older one wrote late."""

        def at(step: Callable[..., Any]) -> Callable[..., Any]:
            def stepped(*arguments: Any) -> Any:
                if dead:
                    raise Killed
                try:
                    self._moment(may_die)
                except Killed:
                    dead.append(True)
                    raise
                done = step(*arguments)
                if self.newest is not None and self.newest.head.incarnation == self.incarnation:
                    self.newest.restore()
                return done

            return stepped

        dead: list[bool] = []

        async def look() -> None:
            head = self.lead()
            head.context.is_fenced = at(head.context.is_fenced)  # type: ignore[method-assign]
            head.context.duties_file.write = at(head.context.duties_file.write)  # type: ignore[method-assign]
            await head.requests.turn()
            head.context.close_files()
            self.newest = max(filter(None, (self.newest, head)), key=lambda one: one.head.incarnation)

        asyncio.run(look())

    def _moment(self, may_die: bool) -> None:
        match self.moments.pop(0) if self.moments else "":
            case "die" if may_die:
                raise Killed
            case "freeze" if self.incarnation < 6:
                self.turn(may_die=False)


@settings(max_examples=40, deadline=None)
@given(lives=st.lists(st.lists(st.sampled_from(["", "", "die", "freeze"]), max_size=6), min_size=1, max_size=3))
def test_each_request_is_done_once(lives: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        history = History(Path(directory), [])
        asked = []
        for number, moments in enumerate(lives):
            requests.ask(history.place.directory, RunAsk(run=f"r{number}"))
            requests.ask(history.place.directory, StrikeAsk(node=f"n{number}", reason="x"))
            asked.append(number)
            history.moments = list(moments)
            with contextlib.suppress(Killed):
                history.turn(may_die=True)
        history.moments = []
        history.turn(may_die=False)
        duties = history.place.read("duties.json")
        assert duties["queue"] == [f"r{number}" for number in asked]
        assert duties["strikes"] == {f"n{number}": 1 for number in asked}
        assert not list((history.place.directory / records.REQUESTS).iterdir())
