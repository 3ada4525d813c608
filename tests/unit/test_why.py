"""Verdicts: on a corpus of logs in the formats of torch, NCCL and Slurm, and on what is no log at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import raylaunch
from raylaunch.observe.why import log_lines, run, verdict
from raylaunch.observe.why.log_lines import Line
from raylaunch.observe.why.verdict import judge
from raylaunch.state import event_log, files

DATA = Path(__file__).with_name("data")
CORPUS, REAL = DATA / "why", DATA / "why-real"
"""Composed after published formats; and caused for real, by tests/corpus/make.py."""
ASIDE = (DATA / "why-aside", DATA / "why-real-aside")
"""Logs that the rules were not made for."""
RANK_MISSED = {"pyspy-stuck-dataloader"}  # said in prose alone


OWN = [
    ("trainers/parallel.py", "need a multiple of", "RunError: the parallelism settings need a multiple of 4 workers, got 6 (distributed: tp_size 4", "mismatch"),
    ("trainers/llama_weights.py", "do not match the shape of model", "RunError: the weights in /m do not match the shape of model: dim 8", "mismatch"),
    ("checkpoint/resume.py", "was written with different data settings", "RunError: the checkpoint /c/step-00000004 was written with different data settings (seed: 1 → 2)", "mismatch"),
    ("checkpoint/saver.py", "does not read", "StateError: rank 3 does not read /c/step-00000004/a.distcp as rank 0 does", "not_shared"),
    ("trainers/text_corpus.py", "data.text: nothing matches", "RunError: data.text: nothing matches '/x/*.txt'", "data_error"),
    ("training/hang_detector.py", "no progress for", "no progress for 130.2 s (limit 120.0 s) at step 40: waiting for rank 3", "hang"),
]  # fmt: skip
"""Errors of raylaunch's own: where, by which words, a whole one, its verdict."""


@pytest.mark.parametrize(("module", "words", "text", "kind"), OWN)
def test_errors_of_our_own_are_known(module: str, words: str, text: str, kind: str) -> None:
    """A text that is rewritten there must be known here."""
    assert words in (Path(raylaunch.__file__).parent / module).read_text() and words in text
    raised = "Traceback (most recent call last):\n" if "Error: " in text else ""
    found = judge(Line("rank-3.log", number, line) for number, line in enumerate(f"{raised}{text}".splitlines(), 1))
    assert found.kind == kind, found


def expectations(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((folder / "expected.json").read_text())
    return found


@pytest.mark.parametrize(
    ("folder", "name"), [(folder, name) for folder in (CORPUS, REAL) for name in expectations(folder)]
)
def test_the_first_answer_is_right(folder: Path, name: str) -> None:
    expected, path = expectations(folder)[name], folder / f"{name}.log"
    found = judge(log_lines.lines(path))
    assert found.kind == expected["kind"], found
    if expected["rank"] is not None and name not in RANK_MISSED:
        assert found.rank == expected["rank"], found
    if expected["host"] is not None:
        assert found.host == expected["host"], found
    text = path.read_bytes().decode().split("\n")
    for one in found.evidence:
        assert one.text in text[one.line - 1]
    assert found.action and 0 < found.confidence < 1


@pytest.mark.parametrize("folder", ASIDE, ids=lambda folder: folder.name)
def test_on_logs_that_were_kept_aside_nine_of_ten_first_answers_are_right(folder: Path) -> None:
    expected = expectations(folder)
    found = {name: judge(log_lines.lines(folder / f"{name}.log")).kind for name in expected}
    wrong = {name: kind for name, kind in found.items() if kind != expected[name]["kind"]}
    assert len(expected) >= 26 and len(wrong) <= len(expected) / 10, wrong


def test_no_line_that_means_something_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for path in sorted(CORPUS.glob("*.log")) for line in log_lines.lines(path)]
    quick = [finding.line for finding in verdict._findings(lines, verdict.Hosts())]
    monkeypatch.setattr(verdict, "HINTS", ("",))
    assert quick == [finding.line for finding in verdict._findings(lines, verdict.Hosts())] and len(quick) > 50


def test_what_followed_is_no_cause() -> None:
    found = judge(log_lines.lines(CORPUS / "cuda_oom_rank3.log"))
    assert any("Watchdog" in text and text.startswith("rank 0") for text in found.cascade)
    assert found.evidence[0].text.endswith("line 61, in main")  # the user's own line, not torch's


def test_a_time_limit_that_a_hang_ran_into_is_the_hang_s() -> None:
    texts = [
        "[rank1]:[E1104 11:02:13.1 ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=7, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600012 milliseconds before timing out.",
        "slurmstepd: error: *** JOB 4711 ON n1 CANCELLED AT 2026-11-04T11:30:00 DUE TO TIME LIMIT ***",
    ]
    lines = [Line("f", number, text, 1 if number == 1 else None) for number, text in enumerate(texts, 1)]
    found = judge(lines)
    assert found.kind == "nccl_timeout" and "TIME LIMIT" in found.cascade[-1]
    assert judge(lines[1:]).kind == "time_limit"


def test_a_traceback_that_breaks_off_still_has_its_place() -> None:
    texts = ["Traceback (most recent call last):", '  File "/w/train.py", line 61, in main', "    step(batch)",
             '  File "/v/site-packages/torch/nn/modules/module.py", line 1, in _call_impl']  # fmt: skip
    found = judge([Line("f", number, text) for number, text in enumerate(texts, 1)])
    assert found.kind == "python_exception" and found.evidence[0].text == texts[1].strip() and found.confidence <= 0.5


def test_a_long_log_is_read_at_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_lines, "HEAD_BYTES", 1000)
    monkeypatch.setattr(log_lines, "TAIL_BYTES", 2000)
    path = tmp_path / "long.log"
    rows = [f"row {number}" for number in range(1, 100_001)]
    path.write_text("\n".join(rows) + "\n")
    read = list(log_lines.lines(path))
    assert read[0].text == "row 1" and read[-1].text == "row 100000" and len(read) < 500
    assert all(line.text == f"row {line.number}" for line in read)


def test_progress_bars_and_colours_are_read_as_they_look(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(b"\x1b[31m[rank2]: 10%\r[rank2]: 20%\x1b[0m\r\n\xff\xfe\x00 binary\n")
    first, second = log_lines.lines(path)
    assert (first.text, first.rank) == ("[rank2]: 20%", 2)
    assert "binary" in second.text and second.number == 2


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=3000))
def test_nothing_makes_it_stumble(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    judge(log_lines.lines(tmp_path / "x"))


@given(
    st.lists(
        st.sampled_from([*"{}[]:()'\"", "rank", "Error", "exit code ", "137", " ", "CANCELLED AT x DUE TO TIME LIMIT"]),
        max_size=12,
    )
)
def test_no_line_makes_it_stumble(parts: list[str]) -> None:
    judge([Line("f", 1, "".join(parts))])


def a_run(directory: Path, ended: dict[str, Any], logs: dict[int, str], errors: dict[int, float] | None = None) -> Path:
    attempt = files.make_dir(files.attempt_dir(directory, 1))
    for rank, text in logs.items():
        (attempt / f"rank-{rank}.log").write_text(text)
    for rank, when in (errors or {}).items():
        files.write_json(attempt / f"rank-{rank}.error.json", {"rank": rank, "node": f"n{rank}", "time": when})
    event_log.write(directory, "attempt_started", attempt=1)
    for event in ended.pop("before", []):
        event_log.write(directory, attempt=1, **event)
    event_log.write(directory, "attempt_ended", attempt=1, **ended)
    return directory


def explained(directory: Path) -> Any:
    failed = run.last_failure(directory)
    assert failed is not None
    return run.explain(directory, failed)


TRACE = 'Traceback (most recent call last):\n  File "/w/own.py", line 7, in train\n    x\n{}\n'


def test_of_a_run_the_rank_that_failed_first_is_named(tmp_path: Path) -> None:
    """The driver was told of a survivor's broken connection first."""
    logs = {
        0: TRACE.format("RuntimeError: Connection closed by peer"),
        3: TRACE.format("ValueError: a bad sample"),
    }
    ended = {"how": "fault", "cause": "communication", "error": "rank 0: Connection closed", "rank": 0, "node": "n0"}
    found = explained(a_run(tmp_path, ended, logs, {0: 20.0, 3: 10.0}))
    assert (found.kind, found.rank, found.host) == ("python_exception", 3, "n3")
    assert found.cause == "ValueError: a bad sample" and found.evidence[0].text == 'File "/w/own.py", line 7, in train'


def test_of_a_run_that_hung_the_line_is_named(tmp_path: Path) -> None:
    hang = {"kind": "hang", "rank": 1, "stack": "/r/rank-1.stack.txt", "line": "own.py:7 in stuck", "reason": "no step"}
    ended = {"how": "fault", "cause": "hang", "error": "rank 1 on n1 hangs", "rank": 1, "node": "n1", "before": [hang]}
    found = explained(a_run(tmp_path, ended, {0: "", 1: ""}))
    assert (found.kind, found.rank, found.host) == ("hang", 1, "n1")
    assert found.evidence[-1].text == "own.py:7 in stuck"


RAY_SAYS = """Traceback (most recent call last):
  File "/w/raylaunch/training/driver.py", line 221, in _fit
    group.fit()
  File "/v/site-packages/ray/train/v2/api/data_parallel_trainer.py", line 195, in fit
    raise result.error
ray.train.WorkerGroupError: Training failed due to worker errors:
[Rank 1 Error Snippet]:
ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
"""


def test_of_a_run_a_lost_node_and_a_killed_worker(tmp_path: Path) -> None:
    logs = {0: TRACE.format("RuntimeError: Connection reset by peer")}
    lost = {"how": "fault", "cause": "node_lost", "error": "n2 is lost", "rank": None, "node": "n2"}
    found = explained(a_run(tmp_path / "a", lost, logs))
    assert (found.kind, found.host) == ("node_failure", "n2") and found.evidence[0].text == "n2 is lost"
    killed = {"how": "fault", "cause": "worker_lost", "error": "lost rank 1: SIGKILL", "rank": 1, "node": "n1"}
    found = explained(a_run(tmp_path / "b", killed, logs))
    assert (found.kind, found.rank) == ("unknown", 1) and found.confidence <= 0.5 and "memory" in found.action
    driver = tmp_path / "b/logs/driver.log"
    driver.parent.mkdir()
    driver.write_text(RAY_SAYS + "alerts: webhook: Connection refused\n")
    assert explained(tmp_path / "b") == found
    gpu = {"how": "error", "cause": "error", "error": "rank 1: OutOfMemoryError", "rank": 1, "node": "n1"}
    found = explained(a_run(tmp_path / "c", gpu, {1: TRACE.format("torch.OutOfMemoryError: CUDA out of memory.")}))
    assert (found.kind, found.rank, found.host) == ("oom_cuda", 1, "n1")
    assert run.last_failure(a_run(tmp_path / "d", {"how": "finished"}, {})) is None
