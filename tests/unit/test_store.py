"""What counts as a checkpoint, whatever a crash leaves behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from raylaunch.checkpoint import store
from raylaunch.errors import StateError


def write(directory: Path, step: int, attempt: int = 1) -> Path:
    """What the ranks do before the commit."""
    path = store.pending(directory, step, attempt)
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_text(f"shard of step {step} by attempt {attempt}")
    return path


def save(directory: Path, step: int, attempt: int = 1) -> store.Commit:
    return store.commit(
        write(directory, step, attempt), step=step, world_size=2, attempt=attempt, run="r", facts={"seed": 0}
    )


def steps(directory: Path) -> list[int]:
    return [commit.step for commit in store.committed(directory)]


def test_a_commit_is_found_again_with_all_it_says(tmp_path: Path) -> None:
    made = save(tmp_path, 100)
    assert made.path == tmp_path / "step-00000100"
    assert store.committed(tmp_path) == [made] and store.latest(tmp_path) == made
    assert (made.world_size, made.attempt, made.run, made.facts) == (2, 1, "r", {"seed": 0})
    assert sorted(p.name for p in made.path.iterdir()) == ["__0_0.distcp", "commit.json"]


def test_no_directory_or_an_empty_one_holds_nothing(tmp_path: Path) -> None:
    assert store.committed(tmp_path / "none") == [] and store.latest(tmp_path) is None
    assert store.collect(tmp_path / "none", attempt=1) == []


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
        store.collect(tmp_path, attempt=2)
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
    gone = store.retain(tmp_path, keep)
    assert steps(tmp_path) == left
    assert [c.step for c in gone] + left == [10, 20, 30, 40]
    assert len(list(tmp_path.iterdir())) == len(left)


def test_collect_removes_leftovers_of_others_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    write(tmp_path, 2, attempt=1)
    write(tmp_path, 2, attempt=12)
    write(tmp_path, 3, attempt=2)
    (tmp_path / "step-00000000.del-ab12").mkdir()
    (tmp_path / "notes.tmp-1").write_text("")
    assert store.collect(tmp_path, attempt=2) == [
        "step-00000000.del-ab12",
        "step-00000002.tmp-1",
        "step-00000002.tmp-12",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "notes.tmp-1",
        "step-00000001",
        "step-00000003.tmp-2",
    ]


def test_a_crash_while_deleting_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        store.retain(tmp_path, 1)
    assert steps(tmp_path) == [2] and len(list(tmp_path.iterdir())) == 2
    store.collect(tmp_path, attempt=1)
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


def test_a_damaged_commit_file_is_an_error_not_a_guess(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2).path / "commit.json").write_text("{")
    with pytest.raises(StateError, match="step-00000002"):
        store.latest(tmp_path)
