"""Who comes after whom: runs that are handed over again, heads that claimed and said nothing."""

from __future__ import annotations

import asyncio
import errno
import time
from pathlib import Path

import pytest

from raylaunch.checkpoint import store
from raylaunch.cluster.membership import election, head_search
from raylaunch.cluster.membership.head_search import HeadSearch
from raylaunch.config.schema import Config
from raylaunch.state import files, records, runs
from raylaunch.state.members import MemberRow
from raylaunch.state.records import Head


def head(incarnation: int) -> Head:
    return Head(canary="c", incarnation=incarnation, node="n1", hostname="n1", address="127.0.0.1", control_port=1,
                gcs="", dashboard_port=1, time=0.0)  # fmt: skip


def test_a_run_goes_on_where_incarnations_begin_anew(tmp_path: Path) -> None:
    """On a cluster of another name: what is fenced there is fenced by the same run's past."""
    run = files.run_dir(tmp_path, "r")
    with runs.prepared(run, Config(), "old") as first:
        assert first.incarnation_offset == 0
    checkpoints = runs.checkpoint_dir(run, Config())
    store.fence(checkpoints, first.incarnation_offset + 12, 7)
    first.save(run, state="stopped", attempt=7)
    with runs.prepared(run, Config(), "new") as second:
        store.fence(checkpoints, second.incarnation_offset + 1, second.attempt + 1)
    with pytest.raises(store.Fenced):  # the old cluster's driver, should it come back
        store.fence(checkpoints, first.incarnation_offset + 12, 8)


def seeker(directory: Path) -> HeadSearch:
    async def lead(number: int, why: str) -> Head:
        raise AssertionError(f"{number} {why}")

    return HeadSearch(directory, "c", "n2", "token", dict, lead, frozenset, lost=head(3), gone=False)


def test_a_claim_has_a_while_to_be_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever claimed may write slowly; a second head beside it would not be kept out by its number."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert records.claim(tmp_path, 3, "n1") and records.claim(tmp_path, 4, "n3")
    made = seeker(tmp_path)

    async def look() -> int:
        return await made._claim()

    assert asyncio.run(look()) == 0 and made._began == 100.0
    now[0] += election.PUBLISH_LIMIT - 0.1
    assert asyncio.run(look()) == 0 and made._began == 100.0
    now[0] += 0.2  # it died
    assert asyncio.run(look()) == 5
    assert records.claims(tmp_path) == [3, 4, 5]


@pytest.mark.parametrize(
    ("lost", "newest", "seen", "may"),
    [
        (3, 3, 0.0, True),  # nobody has
        (3, 4, 0.0, False),
        (3, 4, election.PUBLISH_LIMIT, True),  # it died before it said where it is
    ],
)
def test_who_may_claim(lost: int, newest: int, seen: float, may: bool) -> None:
    assert election.may_claim(lost, newest, seen) is may


def test_a_search_keeps_one_connection(tmp_path: Path) -> None:
    """A won election counts more than the old head that answered meanwhile."""

    class Connection:
        closed = False

        def close(self) -> None:
            self.closed = True

    made, old, own = seeker(tmp_path), Connection(), Connection()
    made._take(old, head(3))  # type: ignore[arg-type]
    made._take(own, head(4))  # type: ignore[arg-type]
    assert old.closed and not own.closed and made._found is not None and made._found[1].incarnation == 4


def test_a_claim_on_a_full_disk_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, tries = seeker(tmp_path), []
    made._rows = (MemberRow(name="n2", state="ready"),)
    made.gone, made._began = True, time.monotonic() - 5

    def full(*_: object) -> bool:
        tries.append(1)
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(records, "claim", full)
    monkeypatch.setattr(head_search, "STORAGE_PAUSE", 0.0)
    for _ in range(2):
        asyncio.run(made._judge())
    assert len(tries) == 2
