"""What counts as a checkpoint, whatever a crash leaves behind."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raylaunch.checkpoint import checksums, store
from raylaunch.errors import StateError

DATA = "__0_0.distcp"


def write(directory: Path, step: int, attempt: int = 1, incarnation: int = 1) -> Path:
    """What the ranks do before the commit."""
    path = store.pending(directory, step, incarnation, attempt)
    path.mkdir(parents=True)
    (path / DATA).write_text(f"shard of step {step} by attempt {attempt}")
    return path


def commit(pending: Path, step: int, attempt: int = 1, incarnation: int = 1) -> store.Commit:
    files = {DATA: checksums.digest(pending / DATA)} if pending.exists() else {}
    return store.commit(
        pending,
        step=step,
        world_size=2,
        attempt=attempt,
        run="r",
        facts={"seed": 0},
        run_incarnation=incarnation,
        files=files,
    )


def save(directory: Path, step: int, attempt: int = 1, incarnation: int = 1) -> store.Commit:
    return commit(write(directory, step, attempt, incarnation), step, attempt, incarnation)


def steps(directory: Path) -> list[int]:
    return [commit.step for commit in store.committed(directory)]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_commit_is_found_again_with_all_it_says(tmp_path: Path) -> None:
    made = save(tmp_path, 100)
    assert made.path == tmp_path / "step-00000100"
    assert store.committed(tmp_path) == [made] and store.latest(tmp_path) == made
    assert (made.world_size, made.attempt, made.run, made.facts) == (2, 1, "r", {"seed": 0})
    assert made.incarnation == 1 and made.files == {DATA: checksums.digest(made.path / DATA)}
    assert names(made.path) == [DATA, "commit.json"]


def test_no_directory_or_an_empty_one_holds_nothing(tmp_path: Path) -> None:
    assert store.committed(tmp_path / "none") == [] and store.latest(tmp_path) is None
    assert store.collect(tmp_path / "none", 1, 1) == []


def test_newest_is_the_highest_step_also_beyond_eight_digits(tmp_path: Path) -> None:
    for step in (20, 123_456_789, 3):
        save(tmp_path, step)
    assert steps(tmp_path) == [3, 20, 123_456_789]


def test_what_is_not_committed_is_never_found(tmp_path: Path) -> None:
    save(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-4").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert steps(tmp_path) == [1]


def test_a_crash_at_any_point_of_the_commit_leaves_it_uncommitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for where in ("os.fsync", "pathlib.Path.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(where, crash)
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path, 5, attempt=1)
        assert steps(tmp_path) == []
        store.collect(tmp_path, 1, 2)
        assert list(tmp_path.iterdir()) == []


def test_a_step_committed_twice_keeps_the_first(tmp_path: Path) -> None:
    first = save(tmp_path, 10, attempt=1)
    again = save(tmp_path, 10, attempt=2)
    assert again == first
    assert (first.path / "__0_0.distcp").read_text() == "shard of step 10 by attempt 1"
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]


def test_a_directory_in_the_way_without_a_commit_gives_way(tmp_path: Path) -> None:
    (tmp_path / "step-00000010").mkdir()
    (tmp_path / "step-00000010" / "junk").write_text("")
    save(tmp_path, 10)
    assert steps(tmp_path) == [10]
    assert not (tmp_path / "step-00000010" / "junk").exists()


@pytest.mark.parametrize(("keep", "left"), [(2, [30, 40]), (1, [40]), (0, [40]), (9, [10, 20, 30, 40])])
def test_retain_keeps_the_newest_and_at_least_one(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    gone = store.retain(tmp_path, store.RetentionPolicy(keep), 1, 1)
    assert steps(tmp_path) == left
    assert [c.step for c in reversed(gone)] + left == [10, 20, 30, 40]
    assert len(list(tmp_path.iterdir())) == len(left)


def test_collect_removes_leftovers_of_older_writers_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    write(tmp_path, 2, attempt=1)
    write(tmp_path, 2, attempt=12)
    write(tmp_path, 3, attempt=2, incarnation=2)
    write(tmp_path, 3, attempt=3, incarnation=2)  # newer than the caller: it is the caller that is stale
    for name in ("step-00000000.del-ab12", "step-00000002.tmp-7", "step-00000001.bad-ab12"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.tmp-1").write_text("")
    assert store.collect(tmp_path, 2, 2) == [
        "step-00000000.del-ab12",
        "step-00000002.tmp-1-1",
        "step-00000002.tmp-1-12",
        "step-00000002.tmp-7",  # from before there were incarnations
    ]
    assert names(tmp_path) == [
        "notes.tmp-1",
        "step-00000001",
        "step-00000001.bad-ab12",
        "step-00000003.tmp-2-2",
        "step-00000003.tmp-2-3",
    ]


def test_a_crash_while_deleting_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        store.retain(tmp_path, store.RetentionPolicy(1), 1, 1)
    assert steps(tmp_path) == [2] and len(list(tmp_path.iterdir())) == 2
    store.collect(tmp_path, 1, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StateError, match="No space left") as caught:
        save(tmp_path, 5)
    assert "keep_last_n_checkpoints" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_hold_checkpoints_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="checkpoint") as caught:
        store.committed(tmp_path / "file")
    assert "checkpoint_dir" in caught.value.hint


def tear(made: store.Commit) -> None:
    (made.path / "commit.json").write_text("{")


def mutilate(made: store.Commit) -> None:
    (made.path / "commit.json").write_text('{"step": 2}')


def truncate(made: store.Commit) -> None:
    os.truncate(made.path / DATA, 3)


def lose(made: store.Commit) -> None:
    (made.path / DATA).unlink()


def lose_commit(made: store.Commit) -> None:
    (made.path / "commit.json").unlink()


def misname(made: store.Commit) -> None:
    file = made.path / "commit.json"
    file.write_text(file.read_text().replace('"step": 2', '"step": 7'))


DAMAGES = [
    (tear, "commit.json", "torn"),
    (mutilate, "commit.json", "not ours"),
    (lose_commit, "commit.json", "missing"),
    (misname, "commit.json", "of step 7"),
    (truncate, DATA, "3 bytes instead of 28"),
    (lose, DATA, "missing"),
]


def bad_ones(directory: Path) -> list[store.InvalidCheckpoint]:
    return [one for one in store.iter_checkpoints(directory) if isinstance(one, store.InvalidCheckpoint)]


@pytest.mark.parametrize(("damage", "file", "why"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, damage: Callable[[store.Commit], None], file: str, why: str
) -> None:
    good, broken = save(tmp_path, 1), save(tmp_path, 2)
    damage(broken)
    before = names(tmp_path)
    assert store.latest(tmp_path) == good and store.committed(tmp_path) == [good]
    (bad,) = bad_ones(tmp_path)
    assert (bad.path, bad.step, bad.file, bad.damaged) == (broken.path, 2, file, True) and why in bad.why
    assert names(tmp_path) == before  # looking changes nothing

    aside = store.set_aside(bad)
    assert aside is not None and aside.name.startswith("step-00000002.bad-")
    assert bad_ones(tmp_path) == [] and store.set_aside(bad) is None
    store.retain(tmp_path, store.RetentionPolicy(1), 1, 9)
    store.collect(tmp_path, 1, 9)
    assert aside.exists() and steps(tmp_path) == [1]
    assert save(tmp_path, 2, attempt=9).attempt == 9  # its place is free again


def test_what_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, other = save(tmp_path, 1), save(tmp_path, 2)
    read = Path.read_text

    def fails(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.parent == other.path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", fails)
    assert store.latest(tmp_path) == good
    assert [(bad.damaged, bad.why) for bad in bad_ones(tmp_path)] == [(False, "Input/output error")]


def test_what_is_kept_besides_the_newest() -> None:
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 2.5}
    made = [
        store.Commit(Path("x"), step, 1, 1, "run", 0.0, {} if loss is None else {"val_loss": loss})
        for step, loss in losses.items()
    ]
    for keep, left in [
        (store.RetentionPolicy(1), [50]),
        (store.RetentionPolicy(2, every=30), [50, 40, 30]),
        (store.RetentionPolicy(1, best=True), [50, 20]),
        (store.RetentionPolicy(1, every=40, best=True), [50, 40, 20]),
    ]:
        gone = keep.surplus(made)
        assert sorted((one.step for one in made if one not in gone), reverse=True) == left


def test_retain_counts_only_what_can_be_used(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    truncate(store.committed(tmp_path)[2])
    store.retain(tmp_path, store.RetentionPolicy(2), 1, 1)
    assert steps(tmp_path) == [2, 4] and (tmp_path / "step-00000003").exists()


def test_a_damaged_checkpoint_in_the_way_of_a_commit_is_set_aside(tmp_path: Path) -> None:
    truncate(save(tmp_path, 5, attempt=1))
    assert save(tmp_path, 5, attempt=2).attempt == 2
    assert steps(tmp_path) == [5]
    assert [name.partition("-")[0] for name in names(tmp_path)] == ["step", "step"]
    assert any(".bad-" in name for name in names(tmp_path))


def test_a_commit_made_by_an_older_version_still_counts(tmp_path: Path) -> None:
    made = save(tmp_path, 3)
    record = json.loads((made.path / "commit.json").read_text())
    del record["incarnation"], record["files"]
    (made.path / "commit.json").write_text(json.dumps({**record, "from_a_newer_one": 1}))
    found = store.latest(tmp_path)
    assert found is not None and (found.incarnation, found.files, found.step) == (1, {}, 3)
    assert checksums.check(found, checksums.share(found, 0, 1)) is None


# Digests.


def test_every_file_is_checked_by_exactly_one_rank(tmp_path: Path) -> None:
    made = dataclasses.replace(save(tmp_path, 1), files={f"__{i}_0.distcp": (1, "") for i in range(7)})
    for world_size in (1, 2, 3, 9):
        shares = [checksums.share(made, rank, world_size) for rank in range(world_size)]
        assert sorted(name for one in shares for name in one) == sorted(made.files)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    made = save(tmp_path, 1)
    assert checksums.check(made, made.files) is None
    data = bytearray((made.path / DATA).read_bytes())
    data[5] ^= 1
    (made.path / DATA).write_bytes(data)
    assert store.latest(tmp_path) == made  # sizes do not tell
    bad = checksums.check(made, made.files)
    assert bad is not None and (bad.file, bad.damaged) == (DATA, True) and "sha256" in bad.why
    lose(made)
    bad = checksums.check(made, made.files)
    assert bad is not None and bad.why == "missing"


def test_a_save_counts_as_slow_only_against_the_earlier_ones() -> None:
    assert not store.unusually_slow(1000, [])
    assert not store.unusually_slow(9, [1, 1, 1])
    assert not store.unusually_slow(20, [7, 8, 100])
    assert store.unusually_slow(25, [7, 8, 100])


# Fencing: an old writer that comes back must not commit, nor delete what the newer one needs.


def test_a_writer_commits_under_its_own_fence(tmp_path: Path) -> None:
    store.fence(tmp_path / "new", 1, 1)
    store.fence(tmp_path / "new", 1, 1)  # a driver that asks twice
    assert steps(tmp_path / "new") == [] and save(tmp_path / "new", 1).step == 1
    assert names(tmp_path / "new") == ["fence-00000001-0001", "step-00000001"]


@pytest.mark.parametrize("newer", [(1, 4), (2, 3), (2, 1)])
@pytest.mark.parametrize("moment", ["before pending", "after pending", "in commit.json", "before rename"])
def test_a_stale_writer_loses_whenever_the_fence_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newer: tuple[int, int], moment: str
) -> None:
    """Incarnation 1, attempt 3 is overtaken at each point of its save. Two incarnations may have the same attempt number."""
    save(tmp_path, 1, attempt=2)
    store.fence(tmp_path, 1, 3)
    if moment == "before pending":
        store.fence(tmp_path, *newer)
    pending = write(tmp_path, 2, attempt=3)
    if moment == "after pending":
        store.fence(tmp_path, *newer)
    with monkeypatch.context() as patch:
        overtake(
            patch, tmp_path, newer, {"in commit.json": "os.fsync", "before rename": "pathlib.Path.rename"}.get(moment)
        )
        with pytest.raises(store.Fenced, match="has taken over"):
            commit(pending, 2, attempt=3)
    assert steps(tmp_path) == [1] and not pending.exists()
    assert names(tmp_path)[0] == f"fence-{newer[0]:08d}-{newer[1]:04d}"
    assert save(tmp_path, 2, attempt=newer[1], incarnation=newer[0]).incarnation == newer[0]
    store.collect(tmp_path, newer[0], newer[1] + 1)
    assert [name for name in names(tmp_path) if "." in name] == []


def overtake(patch: pytest.MonkeyPatch, directory: Path, newer: tuple[int, int], where: str | None) -> None:
    """Let the newer one fence at the next call of `where`, before that does its work."""
    if where is None:
        return
    original = {"os.fsync": os.fsync, "pathlib.Path.rename": Path.rename}[where]

    def fenced_first(*args: Any) -> Any:
        patch.setattr(where, original)
        store.fence(directory, *newer)
        return original(*args)

    patch.setattr(where, fenced_first)


def test_a_fence_counts_though_its_maker_died_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def half_fenced(fd: int) -> None:
        (tmp_path / "fence-00000002-0001").touch()
        fsync(fd)

    monkeypatch.setattr("os.fsync", half_fenced)
    with pytest.raises(store.Fenced):
        save(tmp_path, 2)
    assert names(tmp_path) == ["fence-00000002-0001"]


def test_a_commit_before_the_fence_is_seen_by_who_fenced(tmp_path: Path) -> None:
    store.fence(tmp_path, 1, 1)
    made = save(tmp_path, 4)
    store.fence(tmp_path, 2, 1)
    assert store.latest(tmp_path) == made


def test_the_fence_takes_the_pending_directories_of_older_writers_only(tmp_path: Path) -> None:
    older, mine, newer = (write(tmp_path, 5, incarnation=i, attempt=3) for i in (1, 2, 3))
    store.fence(tmp_path, 2, 3)
    assert not older.exists() and mine.exists() and newer.exists()


def test_a_stale_driver_is_told(tmp_path: Path) -> None:
    store.fence(tmp_path, 2, 5)
    pending = write(tmp_path, 7, incarnation=2, attempt=5)
    for stale in [(1, 9), (2, 4)]:
        with pytest.raises(store.Fenced, match="incarnation 2, attempt 5 has taken over"):
            store.fence(tmp_path, *stale)
    assert names(tmp_path) == ["fence-00000002-0005", pending.name]


def test_fences_compare_as_numbers(tmp_path: Path) -> None:
    store.fence(tmp_path, 1, 9999)
    store.fence(tmp_path, 1, 10_000)
    assert names(tmp_path) == ["fence-00000001-10000"]
    with pytest.raises(store.Fenced):
        store.fence(tmp_path, 1, 9999)


def test_an_old_listing_does_not_help_a_stale_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS may show a directory as it was: there its own fence is still listed, but it cannot be opened."""
    store.fence(tmp_path, 1, 1)
    store.fence(tmp_path, 2, 1)
    monkeypatch.setattr(store, "_fences", lambda _: [(1, 1)])
    with pytest.raises(store.Fenced):
        save(tmp_path, 1)


def test_a_returned_zombie_deletes_nothing(tmp_path: Path) -> None:
    store.fence(tmp_path, 1, 1)
    for step in (1, 2, 3):
        save(tmp_path, step)
    store.fence(tmp_path, 2, 1)
    pending = write(tmp_path, 4, incarnation=2)
    with pytest.raises(store.Fenced):
        store.retain(tmp_path, store.RetentionPolicy(1), 1, 1)
    store.collect(tmp_path, 1, 1)
    assert steps(tmp_path) == [1, 2, 3] and pending.exists()


def test_a_fence_that_cannot_be_written_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(StateError, match=r"cannot fence checkpoint .*No space left"):
        store.fence(tmp_path, 1, 1)
