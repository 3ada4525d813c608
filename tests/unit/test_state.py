"""State files: whole or not there, readable while they grow, and clear about why they cannot be written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from raylaunch.config.schema import Config, continuation_differences, default_run_name
from raylaunch.errors import RunError, StateError, UsageError
from raylaunch.state import event_log, files, records, runs


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"n": 1})
    before = path.stat().st_ino
    files.write_json(path, {"n": 2})
    assert files.read_json(path) == {"n": 2}
    assert path.stat().st_ino != before and path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"n": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match="No space left") as caught:
        files.write_json(path, {"n": 2})
    assert "free some space" in caught.value.hint
    assert files.read_json(path) == {"n": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_missing_is_none_and_broken_is_an_error(tmp_path: Path) -> None:
    assert files.read_json(tmp_path / "none.json") is None
    (tmp_path / "torn.json").write_text('{"n":')
    with pytest.raises(StateError, match=r"torn\.json"):
        files.read_json(tmp_path / "torn.json")


def test_a_growing_file_is_read_a_line_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    reader = files.LineReader(path)
    assert reader.read() == []
    with path.open("a") as out:
        out.write('{"step": 1}\n{"st')
        out.flush()
        assert reader.read() == [{"step": 1}]
        out.write('ep": 2}\n')
        out.flush()
        assert reader.read() == [{"step": 2}]
    assert files.read_lines(path) == [{"step": 1}, {"step": 2}]


def test_lines_that_are_no_rows_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(
        b'5\n[]\n"x"\nnull\n\xff\n\0\n' + b"[" * 100_000 + b'\n{"kind": "commit", "x": ' + b"[" * 100_000 + b"\n"
    )
    event_log.write(tmp_path, "commit", step=1)
    assert [row["step"] for row in files.read_lines(path)] == [1]
    assert [row["step"] for row in event_log.read(tmp_path, "commit")] == [1]


def test_a_file_that_is_nested_too_deeply_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(StateError):
        files.read_json(tmp_path / "a.json")


def test_events_are_one_line_each(tmp_path: Path) -> None:
    event_log.write(tmp_path, "a", reason="two\nlines")
    event_log.write(tmp_path, "b")
    assert [row["kind"] for row in files.read_lines(tmp_path / "events.jsonl")] == ["a", "b"]


def test_last_metrics_passes_over_validation_and_torn_lines(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "val_loss": 2.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 3, "lo')
    assert runs.last_metrics(tmp_path)["step"] == 2
    assert runs.last_metrics(tmp_path / "none") == {}


def prepare(run: Path, config: Config, cluster: str, fresh: bool = False) -> runs.Run:
    with runs.prepared(run, config, cluster, fresh) as record:
        return record


def changed(section: str, **values: object) -> Config:
    return Config.model_validate({section: values})


def test_a_run_is_made_continued_and_refused(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    assert prepare(run, Config(), "main").state == "queued"
    runs.request_stop(run, "x")
    assert prepare(run, changed("optimizer", lr=0.5), "main").state == "queued"
    assert runs.stop_reason(run) is None
    with pytest.raises(RunError, match=r"model\.dim: 128 → 64") as caught:
        prepare(run, changed("model", dim=64), "main")
    assert "--fresh" in caught.value.hint
    prepare(run, changed("model", dim=64), "main", fresh=True)
    assert len(list(run.parent.iterdir())) == 2  # the old one is kept


def test_a_finished_run_needs_more_steps(tmp_path: Path) -> None:
    run = tmp_path / "r"
    prepare(run, Config(), "main").save(run, state="finished")
    with pytest.raises(UsageError, match="finished"):
        prepare(run, Config(), "main")
    assert prepare(run, changed("step_scheduler", max_steps=500), "main").state == "queued"


def test_a_driver_without_a_last_word_has_failed(tmp_path: Path) -> None:
    first = prepare(tmp_path / "r", Config(), "main")
    again = prepare(tmp_path / "r", Config(), "main")
    assert runs.finalize(tmp_path / "r", 0, first.id) == "finished"  # its own end; the new one is not touched
    assert runs.Run.read(tmp_path / "r") == again
    assert runs.finalize(tmp_path / "r", -9, again.id) == "failed"
    record = runs.Run.read(tmp_path / "r")
    assert record is not None and "signal 9" in record.reason


def test_what_may_change_in_a_run() -> None:
    base = Config()
    assert continuation_differences(base, changed("step_scheduler", max_steps=999, warmup_steps=1)) == []
    assert continuation_differences(base, changed("data", seed=3)) == ["data.seed: 0 → 3"]


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/big.yaml", "big"), ("examples/stdlib-lm/train.yaml", "stdlib-lm"), ("x/my run!.yaml", "my-run")],
)
def test_run_names(path: str, name: str) -> None:
    assert default_run_name(Path(path)) == name


def test_records_pass_over_keys_of_a_newer_version(tmp_path: Path) -> None:
    files.write_json(
        tmp_path / records.RUN_FILE, {"name": "r", "state": "queued", "cluster": "c", "created": 0, "new": 1}
    )
    record = runs.Run.read(tmp_path)
    assert record is not None and record.name == "r"


def test_relative_paths_are_the_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = runs.with_absolute_paths(changed("data", text=["a/*.txt", "/b", "stdlib:", "s3://c"])).data.text
    assert paths == [str(tmp_path / "a/*.txt"), "/b", "stdlib:", "s3://c"]


def test_a_run_that_could_not_be_handed_over_never_was(tmp_path: Path) -> None:
    run = tmp_path / "r"
    with pytest.raises(RunError), runs.prepared(run, Config(), "main"):
        raise RunError("sbatch said no")
    assert not run.exists()
    prepare(run, Config(), "main")
    with pytest.raises(RunError), runs.prepared(run, Config(), "main", fresh=True):
        raise RunError("sbatch said no")
    assert run.exists() and [p.name for p in tmp_path.iterdir()] == ["r"]
