"""Alerts: what each kind is made of, that they are few, in order and said once, and that no address gets out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from raylaunch.cli import cli
from raylaunch.config import loader, secrets
from raylaunch.config.schema import AlertKind, AlertsConfig, Config
from raylaunch.errors import ConfigError, UsageError
from raylaunch.host.processes import start_time
from raylaunch.observe.alerts import alert_sinks, baselines, details, outbox
from raylaunch.observe.alerts.alert import Alert, lasting, message, severity
from raylaunch.observe.alerts.alert_rules import Rules, RuleState
from raylaunch.observe.alerts.alert_sinks import Result
from raylaunch.observe.alerts.outbox import Due, Outbox
from raylaunch.observe.alerts.rate_limit import Limiter
from raylaunch.observe.alerts.sender import AlertSender, _last_line
from raylaunch.observe.trackers import sinks as trackers
from raylaunch.scheduler.slurm import mail
from raylaunch.state import event_log, files, records, runs
from raylaunch.tools.sandbox.procs import wait_for

SECRET = "https://hooks.example.org/services/T0/B0/s3cr3t"


class Told:
    """A run as the rules see it, with a clock of its own. A step takes a second."""

    def __init__(self, **sections: Any) -> None:
        steps = {"max_steps": 10000, "ckpt_every_steps": 100, "val_every_steps": 0}
        self.config = Config.model_validate({"step_scheduler": steps, **sections})
        self.now = 1000.0
        self.rules = Rules(self.config, RuleState(), self.now)
        self.attempt = self.step = 0

    def event(self, kind: str, **fields: Any) -> list[Alert]:
        return self.rules.take([{"time": self.now, "kind": kind, "attempt": self.attempt, **fields}], [], [], self.now)

    def cluster(self, *rows: tuple[str, dict[str, Any]]) -> list[Alert]:
        return self.rules.take([], [], [{"time": self.now, "kind": kind, **row} for kind, row in rows], self.now)

    def start(self, from_step: int = 0, workers: int = 4) -> list[Alert]:
        self.attempt, self.step = self.attempt + 1, from_step
        return self.event("attempt_started", workers=workers, nodes=2, on=["gpu1", "gpu2"], from_step=from_step)

    def steps(self, count: int = 1, loss: Any = 2.0, **row: Any) -> list[Alert]:
        found = []
        for _ in range(count):
            self.now, self.step = self.now + 1, self.step + 1
            line = {"step": self.step, "loss": loss, "attempt": self.attempt, "time": self.now, **row}
            found += self.rules.take([], [line], [], self.now)
        return found

    def wait(self, seconds: float, end: float | None = None) -> list[Alert]:
        self.now += seconds
        return self.rules.tick(self.now, self.now, end)

    def again(self) -> None:
        """Another process goes on with what this one knew, by way of a file."""
        self.rules = Rules(self.config, RuleState.parse(json.loads(json.dumps(asdict(self.rules.memory)))), self.now)


def one(found: list[Alert], kind: AlertKind) -> Alert:
    assert [alert.kind for alert in found] == [kind]
    return found[0]


# -- each kind ---------------------------------------------------------------------------------------


def test_started_once_and_again_in_another_allocation() -> None:
    run = Told()
    assert one(run.start(), "started").text == "started on 2 nodes with 4 workers (gpu[1-2])"
    assert run.steps(10) == []
    run.event("attempt_ended", how="resized", error="grow")
    assert run.start(from_step=10) == []  # the same start, another size
    run.steps(5)
    held = one(run.event("paused", reason="continues in the next allocation (walltime)"), "held")
    assert "walltime" in held.text and held.severity == "warning"
    run.again()
    run.now += 7200
    again = one(run.start(from_step=15), "started")
    assert again.text.startswith("continued from step 15 on 2 nodes") and "2 h 0 min after" in again.text


def test_lost_nodes_by_name_or_many_together() -> None:
    run = Told()
    found = run.cluster(("node_lost", {"node": "gpu7", "reason": "connection\nclosed"}))
    assert one(found, "node_lost").text == "gpu7 is lost: connection closed" and found[0].subject == "gpu7"
    found = run.cluster(("node_failed", {"node": "gpu8", "error": "no GPU"}))
    assert one(found, "node_lost").text == "gpu8 cannot be used: no GPU"
    found = run.cluster(*(("node_lost", {"node": f"gpu{n}", "reason": "silent"}) for n in range(1, 18)))
    assert one(found, "node_lost").text == "17 nodes are lost: gpu[1-17]"
    assert run.cluster(("node_ready", {"node": "gpu7"}), ("node_joined", {"node": "gpu9"})) == []


def test_recovered_at_the_first_step_after_whatever_happened() -> None:
    run = Told()
    run.start()
    run.steps(10)
    run.event("fault", cause="node_lost", node="gpu2", reason="gpu2 is lost")
    assert run.steps(2) == []  # its own, from a file that is read later
    run.event("attempt_ended", how="fault", error="gpu2 is lost", cause="node_lost", step=14)
    assert run.rules.memory.step == 14  # also where its last rows are still to be read
    assert run.steps(2) == []
    run.now += 16
    assert run.start(from_step=5, workers=2) == []
    run.event("attempt_ended", how="error", error="and again")
    assert run.start(from_step=5, workers=2) == []
    run.again()
    run.now += 10
    back = one(run.steps(), "recovered")
    assert (
        back.ask == "recovery" and back.text == "continues at step 6 with 2 workers, 31 s after the fault: gpu2 is lost"
    )
    assert run.steps(5) == []


def test_a_script_recovers_when_its_workers_are_there(tmp_path: Path) -> None:
    run = Told(trainer={"script": "a.py"})
    run.start()
    assert run.event("workers_connected", workers=4) == []
    run.event("attempt_ended", how="fault", error="worker lost")
    run.start()
    assert one(run.event("workers_connected", workers=4), "recovered").text.startswith(
        "the script runs again on 4 workers"
    )


def test_held_only_when_it_lasts() -> None:
    run = Told()
    run.start()
    run.event("attempt_ended", how="fault", error="lost")
    run.event("decision", decision="hold", reason="1 of at least 2 nodes", setting="elastic.min_nodes=2")
    assert run.wait(30) == []
    held = one(run.wait(31), "held")
    assert held.text == (
        "waiting for nodes: 1 of at least 2 nodes (elastic.min_nodes=2); saved, and fails in 29 min (elastic.min_nodes_timeout)"
    )
    assert held.severity == "critical" and run.wait(100) == []
    run.start()
    assert run.wait(200) == []


def test_stalled_when_no_step_comes_for_long_and_told_when_one_does() -> None:
    run = Told()
    assert run.wait(5000) == []  # in the queue
    run.start()
    assert run.wait(5000) == []  # no step yet: the watchdog's
    run.steps(20)
    assert run.wait(120) == []
    stalled = one(run.wait(1), "stalled")
    assert stalled.text == "no step for 2 min, at step 20 (limit 2 min)" and stalled.facts["step"] == 20
    assert run.wait(1000) == []
    run.again()
    assert run.wait(1000) == []  # said already
    assert one(run.steps(), "recovered").subject == "stall"
    run.event("attempt_ended", how="fault", error="hang")
    assert run.wait(5000) == []  # between two attempts


def test_how_long_a_stall_is() -> None:
    config = Told(logging={"log_every_steps": 10}).config
    assert baselines.stall_limit(config, [1.0] * 4, 50) is None
    assert baselines.stall_limit(config, [1.0] * 64, 50) == 120.0
    assert baselines.stall_limit(config, [30.0] * 64, 50) == 300.0
    for step in (90, 95, 100, 9990):  # a save or the end may come before the next line
        assert baselines.stall_limit(config, [1.0] * 64, step) == 600.0
    assert baselines.stall_limit(config, [1.0] * 64, 101) == 120.0


def test_a_spike_of_the_loss_is_said_once_and_a_bad_batch_is_none() -> None:
    run = Told()
    run.start()
    for n in range(200):  # noise
        assert run.steps(loss=2.0 + 0.05 * ((n * 7919) % 13 - 6) / 6) == []
    assert run.steps(loss=2.4) == [] and run.steps(20) == []
    found = run.steps(5, loss=3.0)
    assert one(found, "loss_spike").text == "the loss rose to 2.333 at step 222 (median before: 2)"
    assert one(run.steps(30) + run.steps(1, loss=20.0), "loss_spike").facts["usual"] == 2.0


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e9, max_value=1e9), max_size=130))
def test_a_falling_loss_is_no_spike(losses: list[float]) -> None:
    assert baselines.spike(sorted(losses, reverse=True), 6.0) is None


def test_numbers_that_are_none() -> None:
    run = Told()
    run.start()
    event = run.event("nonfinite", step=7, what="loss", action="skip", loss="nan", grad_norm="inf")
    assert one(event, "nan").text == (
        "step 7: the loss is NaN or infinite (loss nan, gradient norm inf); optimizer.on_nonfinite: skip"
    )
    assert one(run.steps(loss="nan"), "nan").text == "step 1: loss is nan"  # as session.report writes it
    assert one(run.steps(loss=float("inf")), "nan").severity == "critical"
    assert run.rules.memory.loss is None and run.steps(loss=None, note="text") == []


def test_checkpoints_that_fail_or_do_not_come() -> None:
    run = Told()
    run.start()
    assert one(run.event("checkpoint_failed", step=100, error="disk full"), "checkpoint_failed").facts == {"step": 100}
    assert one(run.event("checkpoint_invalid", step=1, file="a", why="torn"), "checkpoint_failed")
    assert one(run.event("checkpoint_slow", step=100, seconds=312.0), "checkpoint_late").text == (
        "saving step 100 took 5 min, much longer than other saves"
    )
    assert run.steps(300) == []  # this trainer may save nothing at all
    run.event("commit", step=300)
    assert run.steps(200) == []
    late = one(run.steps(100), "checkpoint_late")
    assert late.text == "no checkpoint since step 300, now at step 501; expected every 100 steps"
    run.event("commit", step=600)
    assert one(run.steps(201), "checkpoint_late").facts["committed"] == 600


def test_gpus() -> None:
    run = Told()
    found = run.cluster(("gpu_trouble", {"node": "gpu3", "what": "2 uncorrectable ECC errors on GPU 1"}))
    assert one(found, "gpu").text == "GPU trouble on gpu3: 2 uncorrectable ECC errors on GPU 1"
    fault = run.event("fault", cause="hardware", node="gpu3", rank=9, reason="CUDA error: ECC")
    assert one(fault, "gpu").text == "CUDA error: ECC (rank 9 on gpu3)" and fault[0].subject == "gpu3"


def test_the_end_of_the_time_is_told_when_the_run_needs_more() -> None:
    run = Told(alerts={"kinds": ["walltime"]})
    run.start()
    run.steps(100)
    end = run.now + 4000
    assert run.wait(0, end) == [] and run.wait(2100, end) == []
    found = one(run.wait(200, end + 20), "walltime")
    assert found.text == (
        "the allocation ends in 29 min (about 2 h 45 min of training remain); the run saves and continues in another one"
    )
    assert run.wait(60, end) == []
    assert run.cluster(("termination_notice", {"why": "walltime", "seconds_left": 120})) == []  # said already
    taken = one(run.cluster(("termination_notice", {"why": "preempted", "seconds_left": 30})), "walltime")
    assert taken.text.startswith("preempted: the allocation ends in 30 s")
    assert run.wait(0, end + 9000) == []  # somebody gave it more
    assert one(run.wait(9000, end + 9000), "walltime")


def test_a_short_allocation_and_a_run_that_fits_are_no_news() -> None:
    run = Told(step_scheduler={"max_steps": 500, "ckpt_every_steps": 100}, alerts={"kinds": ["walltime"]})
    run.start()
    run.steps(100)
    assert run.wait(0, run.now + 1000) == [] and run.wait(500, run.now + 500) == []  # it never had more
    assert run.wait(0, run.now + 5000) == [] and run.wait(4000, run.now + 4500) == []  # 400 steps are left
    assert run.wait(0, run.now + 500) == []
    assert one(run.cluster(("termination_notice", {"why": "walltime", "seconds_left": 100})), "walltime")


@pytest.mark.parametrize("kind", ["finished", "stopped", "failed"])
def test_the_end(kind: AlertKind) -> None:
    run = Told()
    run.start()
    run.steps(3)
    end = one(run.event(kind, reason="because"), kind)
    assert end.text == ("finished at step 3" if kind == "finished" else f"{kind} at step 3: because")
    assert end.ask == ("verdict" if kind == "failed" else "result") and end.facts["loss"] == 2.0
    assert run.rules.close(run.now, "its cluster ended") == [] and run.wait(9999, run.now + 1) == []


def test_a_cluster_that_ends_without_the_run_s_last_word() -> None:
    run = Told()
    run.start()
    run.steps(8)
    run.event("commit", step=6)
    end = one(run.rules.close(run.now, "its cluster ended (signal SIGTERM)"), "stopped")
    assert end.text == (
        "stopped at step 8: its cluster ended (signal SIGTERM), and the run could not save; the last checkpoint is step 6"
    )
    assert run.rules.close(run.now, "again") == []
    run = Told()
    run.event("paused", reason="walltime")
    assert run.rules.close(run.now, "its cluster ended") == []  # it goes on in another allocation


def test_only_the_kinds_that_are_wanted() -> None:
    run = Told(alerts={"kinds": ["failed"]})
    assert run.start() == [] and run.steps(loss="nan") == []
    assert one(run.event("failed", reason="x"), "failed").id == "1"


def test_every_kind_has_a_severity() -> None:
    kinds = get_args(AlertKind)
    assert Config().alerts.kinds == list(kinds)
    assert {severity(kind) for kind in kinds} == {"info", "warning", "critical"}


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
KINDS = st.sampled_from(
    ["attempt_started", "attempt_ended", "fault", "decision", "commit", "paused", "failed", "nonfinite", "checkpoint_slow",
     "node_lost", "gpu_trouble", "termination_notice", "ending", "workers_connected", "checkpoint_failed"]
)  # fmt: skip
FIELDS = st.sampled_from(["from_step", "on", "nodes", "workers", "reason", "step", "seconds", "node", "loss", "attempt",
                          "seconds_left", "why", "what", "decision", "cause", "how", "goes_on"])  # fmt: skip


@settings(max_examples=50)
@given(st.lists(st.tuples(KINDS, st.dictionaries(FIELDS, ODD, max_size=6)), max_size=12), ODD)
def test_rows_of_any_kind_make_no_error(rows: list[tuple[str, dict[str, Any]]], other: Any) -> None:
    rules = Rules(Config(), RuleState(), 0.0)
    events = [{"time": n, "kind": kind, **fields} for n, (kind, fields) in enumerate(rows)]
    found = rules.take([other, *events], [other, *events], [other, *events], 1.0)
    found += rules.tick(1e6, 1e9, 1e9 + 5) + rules.close(1e9, "x")
    for alert in found:
        json.dumps(message(alert, "run", "main"), allow_nan=False)
    json.dumps(asdict(rules.memory))


# -- not too many ------------------------------------------------------------------------------------


def alert(n: int, kind: AlertKind = "node_lost", subject: str = "gpu1") -> Alert:
    return Alert(kind, f"text {n}", subject, 1000.0 + n, severity(kind), id=str(n))


def test_the_same_thing_soon_again_is_folded_and_not_lost() -> None:
    limiter = Limiter(300, 20)
    assert limiter.offer(alert(0), 0) == [alert(0)]
    assert [limiter.offer(alert(n), n) for n in range(1, 5)] == [[]] * 4 and limiter.release(299) == []
    assert limiter.offer(alert(5, subject="gpu2"), 5) == [alert(5, subject="gpu2")]  # another one
    (folded,) = limiter.release(300)
    assert folded.count == 4 and folded.text.endswith("(4 node_lost); the last: text 4") and folded.subject == "gpu1"
    assert limiter.release(400) == [] and limiter.offer(alert(6), 700) == [alert(6)]


def test_no_more_than_so_many_in_an_hour_but_what_is_critical_and_the_end() -> None:
    limiter = Limiter(0, 3)
    sent = [limiter.offer(alert(n, subject=f"gpu{n}"), n) for n in range(6)]
    assert [len(found) for found in sent] == [1, 1, 1, 0, 0, 0]
    assert len(limiter.offer(alert(6, "stalled", ""), 6)) == 1
    assert limiter.release(1000) == []
    (together,) = limiter.release(3601)
    assert together.count == 3 and "3 node_lost" in together.text and together.subject == ""
    limiter = Limiter(0, 1)
    for n in range(3):
        limiter.offer(alert(n, subject=f"gpu{n}"), n)
    (end,) = limiter.offer(alert(9, "failed", ""), 9)
    assert end.text == "text 9\nheld back until now: 2 node_lost" and limiter.release(9999) == []


def test_what_is_held_back_outlives_the_process_and_clocks_may_be_set_back() -> None:
    limiter = Limiter(300, 20)
    limiter.offer(alert(0), 5000)
    limiter.offer(alert(1), 5001)
    other = Limiter(300, 20)
    other.recall(json.loads(json.dumps(limiter.memory())))
    assert other.release(5299) == [] and replace(other, held=dict(other.held)).release(5300) == [alert(1)]
    assert other.release(10) == [alert(1)]


@given(st.lists(st.tuples(st.integers(0, 400), st.sampled_from(["node_lost", "recovered", "held"]), st.integers(0, 3))))
def test_each_alert_goes_out_once_or_is_counted(history: list[tuple[int, AlertKind, int]]) -> None:
    limiter, now, out = Limiter(300, 5), 0.0, []
    for n, (pause, kind, subject) in enumerate(history):
        now += pause
        out += [(now, a) for a in limiter.offer(alert(n, kind, str(subject)), now) + limiter.release(now)]
    for _ in range(20):
        now += 3600
        out += [(now, a) for a in limiter.release(now)]
    assert sum(a.count for _, a in out) == len(history)
    assert limiter.held == {}
    mild = [moment for moment, a in out if a.severity != "critical"]
    assert all(late - early >= 3600 for early, late in zip(mild, mild[5:], strict=False))


# -- sent in order, tried again, given up ------------------------------------------------------------


def test_each_sink_gets_all_in_order_and_forgets_nothing() -> None:
    box = Outbox()
    for n in range(3):
        box.add({"id": n}, ["slack", "mail"])
    first = box.next("slack")
    assert first is not None and first.message == {"id": 0}
    first.settle("slack", "sent", 5.0)
    box = Outbox(json.loads(json.dumps(box.memory())))
    late, early = box.next("mail"), box.next("slack")
    assert late is not None and early is not None and (late.message["id"], early.message["id"]) == (0, 1)
    late.due["mail"].tries, late.due["mail"].first = 3, 2.0
    late.settle("mail", "given up: x", 5.5)
    assert not late.due and len(box.parcels) == 3
    assert late.done == {
        "slack": {"outcome": "sent", "tries": 0, "seconds": 0.0},
        "mail": {"outcome": "given up: x", "tries": 3, "seconds": 3.5},
    }


def test_when_it_is_tried_again() -> None:
    down = Result(False, "HTTP 500")
    assert [outbox.pause(Due(tries), down, 0.0) for tries in (1, 2, 3, 6, 7, 99)] == [1, 2, 4, 32, 60, 60]
    assert outbox.pause(Due(60), down, 3530.0) == 60 and outbox.pause(Due(61), down, 3541.0) is None
    assert outbox.pause(Due(1), Result(False, "HTTP 429", after=90), 0.0) == 90
    assert outbox.pause(Due(1), Result(False, "HTTP 429", after=1e9), 0.0) == 300
    no = Result(False, "HTTP 404", refused=True)
    assert [outbox.pause(Due(tries, refusals=n), no, 0.0) for n, tries in ((1, 1), (2, 2), (2, 9), (3, 3))] == [
        1,
        2,
        60,
        None,
    ]


def test_retry_after_has_two_forms() -> None:
    assert alert_sinks._after("7") == 7 and alert_sinks._after("") == 0 and alert_sinks._after("soon") == 0
    assert (
        alert_sinks._after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
        and alert_sinks._after("Wed, 21 Oct 2099 07:28:00 GMT") > 1e9
    )


# -- how they look -----------------------------------------------------------------------------------


def test_slack_reads_no_text_as_a_link_or_a_call() -> None:
    made = message(
        Alert("failed", 'in <module>: a & b <!channel>\nFile "x"', time=0.0, severity="critical"), "r", "main"
    )
    text = alert_sinks.slack(made)["text"]
    assert text.startswith(
        '*r*: in &lt;module&gt;: a &amp; b &lt;!channel&gt;\nFile "x"\n_critical: failed, cluster main'
    )


def test_a_mail_has_one_line_of_subject() -> None:
    made = message(Alert("failed", "bad\x07 thing\nmore äö", time=0.0), "r", "main")
    text = mail.letter(made, "me@example.org", alert_sinks.plain(made)).decode()
    assert "\nSubject: [raylaunch] r: bad  thing\n" in text and "\nTo: me@example.org\n" in f"\n{text}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (34.4, "34 s"), (119, "119 s"), (600, "10 min"), (12000, "3 h 20 min"), (360000, "4 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert lasting(seconds) == text


def test_details_of_a_failed_run(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    folder = files.attempt_dir(run, 1)
    folder.mkdir(parents=True)
    (folder / "rank-3.log").write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    event_log.write(
        run, "attempt_ended", attempt=1, how="error", error="oom", cause="error", rank=3, node="gpu1", committed=0
    )
    made = details.complete(Alert("failed", "failed: oom", ask="verdict"), run)
    assert made.text.splitlines()[1].startswith("oom_cuda: ") and made.facts["verdict"]["rank"] == 3
    assert details.complete(Alert("nan", "x"), run) == Alert("nan", "x")


def test_details_of_a_recovery(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    run.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {"time": 0, "kind": "attempt_started", "attempt": 1, "workers": 4, "from_step": 0, "on": ["a", "b"]},
        {"time": 20, "kind": "fault", "attempt": 1, "cause": "node_lost", "node": "b", "reason": "b is lost"},
        {"time": 21, "kind": "attempt_ended", "attempt": 1, "how": "fault", "error": "b is lost", "committed": 5},
        {"time": 22, "kind": "attempt_started", "attempt": 2, "workers": 2, "from_step": 5, "on": ["a"]},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [(n, 1, n) for n in range(1, 11)] + [(6, 2, 30)]
    lines = ({"step": step, "attempt": attempt, "time": when, "loss": 1.0} for step, attempt, when in steps)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = details.complete(Alert("recovered", "x", facts={"cause": "b is lost"}, ask="recovery"), run)
    assert made.text == (
        "recovered: 10 s and 5 steps lost; continued from step 5 with 2 workers (4 before)\nnode_lost: b is lost"
    )
    assert made.facts["steps_lost"] == 5 and made.facts["node"] == "b"
    done = details.complete(Alert("finished", "finished", facts={"loss": 1.25}, ask="result"), run)
    assert "loss 1.2500" in done.text and "1 fault and 5 steps lost" in done.text


# -- secrets -----------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOOK", f"{SECRET}\n")
    monkeypatch.delenv("NO_HOOK", raising=False)
    yield tmp_path


def read(text: str, *sets: str) -> Config:
    Path("c.yaml").write_text(text)
    return loader.load(Path("c.yaml"), sets)


@pytest.mark.parametrize("given_", [SECRET, "env:HOOK", "file:hook", "${HOOK_URL}"])
def test_an_address_is_known_to_the_run_s_0600_config_alone(
    here: Path, given_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_URL", SECRET)
    Path("hook").write_text(f"{SECRET}\n")
    Path("hook").chmod(0o600)
    config = read(f'alerts: {{webhook: "{given_}", slack: "{SECRET}"}}')
    assert "s3cr3t" not in f"{config!r} {config} {config.model_dump()} {trackers._told(config)}"
    assert "s3cr3t" not in config.model_dump_json()
    directory = here / "runs" / "r"
    with runs.prepared(directory, config, "main"):
        pass
    resolved = loader.load_resolved(directory / records.CONFIG_FILE)
    assert [one.get_secret_value() for one in resolved.alerts.addresses.values()] == [SECRET, SECRET]
    holders = [
        path.name for path in here.joinpath("runs").rglob("*") if path.is_file() and "s3cr3t" in path.read_text()
    ]
    assert holders == ["config.yaml"] and (directory / "config.yaml").stat().st_mode & 0o777 == 0o600


def test_the_cluster_s_files_and_the_script_have_none(here: Path) -> None:
    from raylaunch.cluster import up

    config = read(
        f"alerts: {{slack: '{SECRET}', command: [s3cr3t], mail: me@x.org}}\ncluster: {{state_dir: {here}, backend: local}}"
    )
    directory = here / "clusters" / "main"
    up._prepare(config, "local", directory, None, None)
    assert not [path for path in directory.rglob("*") if path.is_file() and "s3cr3t" in path.read_text()]
    assert "--mail-user=me@x.org" in (directory / records.SCRIPT_FILE).read_text()


@pytest.mark.parametrize(
    ("text", "sets"),
    [
        (f"alerts: {SECRET}", []),
        (f"alerts: {{slack: [{SECRET}]}}", []),
        (f"alerts: {{webhook: {{{SECRET}: 1}}}}", []),
        ("alerts: {slack: 's3cr3t is no address'}", []),
        (f"alerts: {{slack: ' {SECRET}'}}", []),
        (f"alerts: {{slak: {SECRET}}}", []),
        (f"alerts: {{slack:{SECRET}}}", []),
        ("alerts: {command: [['s3cr3t']]}", []),
        ("alerts: {command: s3cr3t}", []),
        ("", ["alerts.slack=s3cr3t"]),
        ("", [f"alerts=[{SECRET}]"]),
        ("", [f"alerts={{slack: [{SECRET}]}}"]),
        ("", ["slurm={env: {A: [s3cr3t]}}"]),
        (f"alerts: {{slack: '{SECRET}'}}\nmodel: {{dim: x}}", []),
    ],
)
def test_no_message_holds_an_address(here: Path, text: str, sets: list[str]) -> None:
    with pytest.raises((ConfigError, UsageError)) as caught:
        read(text, *sets)
    assert "s3cr3t" not in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ("env:NO_HOOK", "NO_HOOK is not set"),
        ("env:EMPTY", "what the environment variable EMPTY contains is not a URL"),
        ("file:open", "open contains a secret and is readable by other users"),
        ("file:bad", "what bad contains is not a URL"),
        ("file:none", "cannot read none: No such file"),
        ("file:.", "cannot read .: Is a directory"),
    ],
)
def test_an_address_that_cannot_be_had(here: Path, given_: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY", "")
    Path("open").write_text(SECRET)
    Path("open").chmod(0o640)
    Path("bad").write_bytes(b"s3cr3t \xff\n")
    Path("bad").chmod(0o600)
    config = read(f"alerts: {{slack: '{given_}'}}")  # as `up` reads it, which needs none
    with pytest.raises(UsageError, match=r"^alerts\.slack: ") as caught, runs.prepared(here / "r", config, "main"):
        pass
    assert said in caught.value.message and "s3cr3t" not in str(caught.value) and not (here / "r").exists()


def test_what_a_library_says_is_not_repeated(here: Path) -> None:
    own = secrets.resolved(AlertsConfig.model_validate({"webhook": "http://s3cr3t.invalid:99999/s3cr3t"}))
    found = asyncio.run(alert_sinks.send("webhook", own, {"a": 1}))
    assert not found.ok and found.said and "s3cr3t" not in found.said


# -- mail, commands, the command line ----------------------------------------------------------------


def test_slurm_mails_what_it_can_unless_told_otherwise() -> None:
    def of(**sections: Any) -> tuple[Any, Any]:
        slurm = mail.through_slurm(Config.model_validate(sections))
        return slurm.mail_user, slurm.mail_type

    assert of() == (None, None)
    assert of(alerts={"mail": "me@x.org"}) == ("me@x.org", "BEGIN,END,FAIL,REQUEUE,TIME_LIMIT_90")
    assert of(alerts={"mail": "me", "kinds": ["failed", "nan"]}) == ("me", "FAIL")
    assert of(alerts={"mail": "me", "kinds": ["nan"]}) == (None, None)
    assert of(alerts={"mail": "me"}, slurm={"mail_type": "ALL", "mail_user": "you"}) == ("you", "ALL")
    for bad in ("-oQ/tmp", "a b", "me@", ""):
        with pytest.raises(ValueError, match="mail"):
            AlertsConfig.model_validate({"mail": bad})


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return path


def test_a_command_gets_json_and_its_end_counts(tmp_path: Path) -> None:
    def run(words: list[str]) -> Result:
        return asyncio.run(alert_sinks.send("command", AlertsConfig(command=words), {"kind": "nan"}))

    assert run(["sh", "-c", 'cat > "$1"', "-", str(tmp_path / "got")]) == Result(True)
    assert json.loads((tmp_path / "got").read_text()) == {"kind": "nan"}
    assert run(["true"]) == Result(True)  # who does not read
    assert run(["sh", "-c", "echo s3cr3t >&2; exit 3"]) == Result(False, "exit code 3", refused=True, detail="s3cr3t")
    assert run(["sh", "-c", "kill -9 $$"]).said == "killed by signal 9"
    assert run([str(tmp_path / "none")]).said == "cannot be started: No such file or directory"


def test_a_command_that_hangs_is_ended_with_all_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alert_sinks, "COMMAND_LIMIT", 2.0)
    words = ["sh", "-c", 'sleep 600 & echo $! > "$1"; wait', "-", str(tmp_path / "pid")]
    found = asyncio.run(alert_sinks.send("command", AlertsConfig(command=words), {}))
    assert found == Result(False, "no response within 2 s")
    wait_for("its child is gone", lambda: start_time(int((tmp_path / "pid").read_text())) is None, 5)


def test_mail_goes_by_sendmail_else_by_mail_else_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, "_MORE", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    made = message(Alert("nan", "no number", time=0.0), "r", "main")

    def send() -> Result:
        return asyncio.run(alert_sinks.send("mail", AlertsConfig(mail="me@x.org"), made))

    assert send().said == "this node has neither sendmail nor mail"
    script(tmp_path / "mail", f'/bin/echo "$@" > {tmp_path}/words; /bin/cat > {tmp_path}/got')
    assert send().ok and (tmp_path / "words").read_text() == "-s [raylaunch] r: no number me@x.org\n"
    assert (tmp_path / "got").read_text().startswith("r: no number\n\ninfo: nan, cluster main, ")
    script(tmp_path / "sendmail", f"/bin/cat > {tmp_path}/got")
    assert send().ok and (tmp_path / "got").read_text().startswith("To: me@x.org\n")


def test_the_command_line_says_what_came_of_each(here: Path) -> None:
    Path("c.yaml").write_text("alerts: {command: [sh, -c, 'echo oh >&2; exit 3']}")
    shown = CliRunner().invoke(cli, ["alerts", "test", "c.yaml"])
    assert (
        shown.exit_code == 1
        and shown.output.startswith("command  FAILED: exit code 3 (")
        and "\n         oh\n" in shown.output
    )
    shown = CliRunner().invoke(cli, ["alerts", "test", "c.yaml", "--set", "alerts.command=['true']"])
    assert shown.exit_code == 0 and shown.output.startswith("command  accepted (")
    shown = CliRunner().invoke(cli, ["alerts", "test"])
    assert isinstance(shown.exception, UsageError) and "alerts.slack" in shown.exception.hint


def test_what_a_loss_usually_is_outlives_a_handing_over(here: Path) -> None:
    run_dir = here / "runs" / "r"
    with runs.prepared(run_dir, Config(), "main"):
        pass
    run = runs.Run.read(run_dir)
    assert run is not None
    memory = asdict(RuleState(begun=True, attempt=7, losses=[1.5, 1.4]))
    limits = Limiter(1.0, 9).memory()
    files.write_json(run_dir / "alerts.json", {"run": "another", "limits": limits, "outbox": [], "memory": memory})
    assert AlertSender(run_dir, Config(), run)._rules.memory == RuleState(losses=[1.5, 1.4])


def test_the_alerts_of_a_run_are_listed_whatever_lies_there(here: Path) -> None:
    run = here / "runs" / "r"
    with runs.prepared(run, Config(), "main"):
        pass
    words = ["alerts", "list", "r", "--state-dir", str(here)]
    assert "has sent no alert" in CliRunner().invoke(cli, words).output
    done = {"slack": {"outcome": "sent", "tries": 2, "seconds": 1.0}}
    told = {"alert": "nan", "at": 1e9, "text": "step 7: [red] loss is nan", "id": "1", "count": 1}
    event_log.write(run, "alert", **told, sinks=done)
    box = Outbox()
    box.add(message(Alert("failed", "failed: x", time=1e9), "r", "main"), ["webhook"])
    files.write_json(run / "alerts.json", {"outbox": box.memory()})
    shown = CliRunner().invoke(cli, words).output
    assert "nan  slack sent (2 tries)\n  step 7: [red] loss is nan\n" in shown
    assert "failed  webhook waits: not tried yet" in shown
    told = json.loads(CliRunner().invoke(cli, [*words, "--json"]).output)
    assert [row["alert"] for row in told["alerts"] + told["waiting"]] == ["nan", "failed"]
    with (run / "events.jsonl").open("ab") as out:
        out.write(
            b'{"kind": "alert"}\n[1]\n\xff\x00\n{"kind": "alert", "time": "x", "alert": "nan", "text": 3, "sinks": []}\n'
        )
    for broken in ("{", "[]", '{"outbox": 3}', '{"outbox": [{}]}', "\0"):
        (run / "alerts.json").write_text(broken)
        assert CliRunner().invoke(cli, words).exit_code == 0


def test_the_last_row_of_a_kind_is_found(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert _last_line(path, "queued") is None
    lines = [
        '{"kind": "queued"}',
        '{"kind": "x", "say": "queued"}',
        '{"kind": "queued", "n": 2}',
        '"queued"',
        '{"queued"',
    ]
    path.write_text("\n".join(lines))
    assert _last_line(path, "queued") == sum(len(line) + 1 for line in lines[:2])
    assert _last_line(path, "queued", lambda row: row.get("n") is None) == 0
