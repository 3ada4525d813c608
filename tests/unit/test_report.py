"""The report: what it says of made runs, that it says no secret, and that nothing in a file stops it."""

from __future__ import annotations

import html.parser
import json
import math
import random
import re
import shutil
import stat
import statistics
import xml.etree.ElementTree as xml
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from made_runs import NOW, Made

from raylaunch.cli import cli
from raylaunch.config.schema import CostConfig
from raylaunch.errors import SlurmUnavailable, UsageError
from raylaunch.observe.history import goodput
from raylaunch.observe.report import as_json, cost, curves, formatting, markdown, page, settings, svg
from raylaunch.observe.report.axis import WIDTH, Axis
from raylaunch.observe.report.gather import ReportData, gather
from raylaunch.observe.report.summary import cost_rows
from raylaunch.scheduler.slurm.client import Completed, Slurm
from raylaunch.text import plural

SEP = "\x1f"
SACCT = [
    ["4711", "COMPLETED", "3000", "200", "2", "4-00:00:00", "", "", "billing=1,cpu=200,gres/gpu:h100=16,gres/gpu=16,mem=100G,node=2"],
    ["4711.batch", "COMPLETED", "3000", "100", "1", "00:01.234", "10452K", "1000", "cpu=100,mem=50G,node=1"],
    ["4711.extern", "COMPLETED", "3000", "200", "2", "00:00:00", "", "18446744073709551614", "cpu=200,mem=100G,node=2"],
    ["4711.0", "COMPLETED", "2990", "200", "2", "3-23:59:59", "26214400K", "7200000", "cpu=200,mem=100G,node=2"],
]  # fmt: skip


def slurm(answer: Completed | Exception) -> Slurm:
    def runner(command: Sequence[str], timeout: float, stdin: str | None, env: Mapping[str, str]) -> Completed:
        assert command[0] == "sacct"
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Slurm(runner)


NO_ACCOUNTING = slurm(Completed(1, "", "Slurm accounting storage is disabled\n"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2000 steps in 50 minutes on four nodes of two GPUs, with faults and a change of size."""
    return Made(tmp_path_factory.mktemp("made"), "made", 3000.0, 4, 2, 6, 1.5, 50, seed=1).write()


@pytest.fixture(scope="module")
def facts(made: Path) -> ReportData:
    return gather(made, NO_ACCOUNTING, NOW + 100)


def test_the_facts_are_the_ledgers(made: Path, facts: ReportData) -> None:
    book = goodput.of_run(made)
    assert facts.book.goodput == pytest.approx(book.goodput) and facts.book.recoveries == book.recoveries
    assert facts.state == "finished" and not facts.live
    assert len(facts.survived) >= 4 and facts.book.steps_lost > 0
    assert facts.axis.seconds == pytest.approx(3000, abs=10)
    assert facts.curves.lines == len((made / "metrics.jsonl").read_text().splitlines())
    last = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert facts.loss == [row["loss"] for row in last if "loss" in row][-1]


def test_hours_and_money(facts: ReportData) -> None:
    """Four nodes from 31 s after the hand-over to the end, less what the lost ones missed."""
    away = [n for n in facts.nodes if n.lost]
    assert facts.cost.node_hours is not None and away
    assert facts.cost.node_hours == pytest.approx(sum(n.seconds or 0 for n in facts.nodes) / 3600)
    assert 0.8 * 4 * 2969 / 3600 < facts.cost.node_hours < 4 * 2969 / 3600 + 0.01
    assert facts.cost.gpu_hours_held == pytest.approx(2 * facts.cost.node_hours)
    assert facts.cost.gpu_hours is not None and facts.cost.gpu_hours < facts.cost.gpu_hours_held + 0.05
    assert facts.cost.money == pytest.approx(2.1 * facts.cost.gpu_hours_held) and facts.cost.currency == "EUR"
    assert facts.cost.energy_from == "meters" and facts.cost.joules == pytest.approx(4 * 6400 * 2950, rel=0.1)


def test_the_accounting_is_asked_once_and_read(made: Path) -> None:
    text = "".join(SEP.join(row) + "\n" for row in SACCT)
    found = gather(made, slurm(Completed(0, text)), NOW + 100).cost
    assert found.jobs == ["4711"] and found.gpu_type == "gpu:h100".partition(":")[2]
    assert found.cpu_efficiency == pytest.approx(4 * 86400 / (3000 * 200))
    assert found.memory_efficiency == pytest.approx(25 / 50)
    assert found.joules == 7201000 and found.energy_from == "accounting"
    for answer in (SlurmUnavailable("gone"), Completed(1, "", "boom"), Completed(0, ""), Completed(0, "what\n")):
        again = gather(made, slurm(answer), NOW + 100)
        assert again.cost.cpu_efficiency is None and again.cost.unknown
        assert any("energy and efficiency" in line for line in again.unknown)
        assert ">unknown<small>" in page.render(again)


def test_a_job_that_goes_on_has_no_efficiency_yet(made: Path) -> None:
    """What sacct says of a running job: no time, no memory."""
    row = ["4711", "RUNNING", "3000", "200", "2", "00:00:00", "", "", "cpu=200,mem=100G,node=2"]
    found = gather(made, slurm(Completed(0, SEP.join(row) + "\n")), NOW + 100)
    assert ("efficiency", "unknown", "available after its job has ended") in cost_rows(found)


def test_the_mean_rate_is_what_was_done_over_the_time_it_took(made: Path, facts: ReportData) -> None:
    """A step of 1 s at 4,000 tokens a second and one of 4 s at 1,000: 8,000 tokens in 5 s."""
    series = curves.Series()
    for second, rate in ((1, 4000.0), (5, 1000.0)):
        series.add(second, second, rate)
    assert series.mean_rate == pytest.approx(1600) and curves.Series().mean_rate is None
    rows = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    rates = [row["tokens_per_s"] for row in rows if "loss" in row]
    assert facts.rate == ("tokens", pytest.approx(statistics.harmonic_mean(rates)))


def test_a_long_run_is_thinned_and_keeps_its_extremes(
    made: Path, facts: ReportData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made.parents[1], tmp_path / "state")
    run = tmp_path / "state" / "runs" / "made"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    steps[777]["loss"], steps[888]["tokens_per_s"], steps[999]["loss"] = 250.0, 3.0, "nan"
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(curves, "GROUPS", 100)
    thin = gather(run, NO_ACCOUNTING, NOW + 100)
    assert len(thin.curves.steps) < 400 and thin.curves.lines == facts.curves.lines
    assert thin.book.goodput == pytest.approx(facts.book.goodput, abs=5e-3)
    assert thin.book.steps_lost == facts.book.steps_lost and len(thin.book.recoveries) == len(facts.book.recoveries)
    assert thin.curves.series["loss"].most == 250.0 and thin.loss == facts.loss
    assert min(b.low for b in thin.curves.series["tokens_per_s"].in_order()) == 3.0
    assert thin.curves.nonfinite == 1
    mean, whole = thin.curves.series["loss"].mean, facts.curves.series["loss"].mean
    assert mean == pytest.approx(whole, rel=0.02)  # the spike says nothing of the mean
    assert ", log scale" in page.render(thin)


class Page(html.parser.HTMLParser):
    """Which elements and addresses a page has, and whether every one is closed."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [str(value) for name, value in attrs if name in {"src", "href", "srcset", "action"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_and_hides_what_is_secret(facts: ReportData) -> None:
    text = page.render(facts)
    found = Page(text)
    assert not {"script", "iframe", "object", "img"} & set(found.tags)
    assert found.addresses == ["data:,"] and "@import" not in text and "url(" not in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text and "default-src 'none'" in text
    assert "very-secret-value" not in text and "(hidden)" in text and "${HF_HOME}" in text
    for recovery in facts.book.recoveries:
        assert facts.named(recovery) in text
    for name, seconds in facts.book.parts.items():
        assert (formatting.PARTS[name][0] in text) or seconds < 1e-3
    assert len(text) < 300_000


def test_what_a_file_says_is_text(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made.parents[1], tmp_path / "state")
    state_dir, bad = tmp_path / "state", "<script>alert(1)</script>\"'&"
    for path in state_dir.rglob("*.json*"):
        path.write_text(path.read_text().replace("the connection was closed", bad.replace('"', '\\"')).replace("all steps are done", bad.replace('"', '\\"')))  # fmt: skip
    record = state_dir / "runs" / "made" / "run.json"
    record.write_text(record.read_text().replace('"finished"', '"failed"'))
    found = gather(state_dir / "runs" / "made", NO_ACCOUNTING, NOW + 100)
    text = page.render(found)
    assert found.reason == bad and "<script>" not in text and "&lt;script&gt;" in text
    Page(text)


def test_a_huge_run_has_a_small_page(tmp_path: Path) -> None:
    run = Made(tmp_path, "huge", 4e6, 40, 8, 420, 900.0, 50, load=False, seed=2).write()
    found = gather(run, NO_ACCOUNTING, NOW + 100)
    assert len(found.book.recoveries) > 250
    text = page.render(found)
    assert len(text) < 800_000 and "more are in" in text
    assert len(markdown.markdown(found)) < 100_000


def test_json_has_the_documented_keys(facts: ReportData) -> None:
    value = json.loads(json.dumps(as_json.as_dict(facts), allow_nan=False))
    documented = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    for key in [*value, *value["training"], *value["cost"], *value["ledger"], *value["nodes"][0]]:
        assert f"`{key}`" in documented, key
    assert value["ledger"]["parts"].keys() == set(goodput.PARTS)
    assert "very-secret-value" not in json.dumps(value)


def test_markdown_has_whole_tables(facts: ReportData) -> None:
    text = markdown.markdown(facts)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    for table in tables:
        assert len({row.count("|") - row.count("\\|") for row in table.splitlines()}) == 1


def test_nearly_nothing_is_known(tmp_path: Path) -> None:
    """A run directory with an event or two, of an older version or a torn one; nothing else."""
    run = tmp_path / "runs" / "bare"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"name": "bare", "state": "queued", "cluster": "gone", "created": 1700000000.0}')
    found = gather(run, NO_ACCOUNTING, NOW)
    assert found.state == "interrupted" and found.book.steps == 0 and len(found.unknown) >= 4
    Page(page.render(found))
    (run / "run.json").write_text('{"name": "ba')
    (run / "metrics.jsonl").write_bytes(b"\x00\xff" * 300 + b"\n[1, 2]\n3\n{}\n" + b"x" * 200_000 + b"\n" + b'{"step": 3, "loss": 2.5, "attempt": 1, "time": 1700000100.0}\n' * 2)  # fmt: skip
    found = gather(run, NO_ACCOUNTING, NOW)
    assert found.state == "unknown" and found.book.steps == 3 and any("run.json" in line for line in found.unknown)
    Page(page.render(found))
    assert "steps" in markdown.markdown(found)
    json.dumps(as_json.as_dict(found), allow_nan=False)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_files_hold(made: Path, tmp_path: Path, seed: int) -> None:
    """Files cut off, filled with noise, of other types: a report all the same."""
    source = random.Random(seed)
    shutil.copytree(made.parents[1], tmp_path / "state", ignore=shutil.ignore_patterns("load.jsonl"))
    files = sorted(path for path in (tmp_path / "state").rglob("*") if path.is_file())
    for path in source.sample(files, 4):
        raw = path.read_bytes()
        noise = bytes(source.randrange(256) for _ in range(200))
        strange: list[Any] = [None, "x", -1, [], {}, 1e300, True]
        if path.suffix == ".jsonl" and source.random() < 0.5:
            rows = [json.loads(line) for line in raw.splitlines()]
            for row in source.sample(rows, len(rows) // 3):
                row[source.choice(list(row))] = source.choice(strange)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_bytes(
                source.choice([raw[: source.randrange(len(raw))], noise, noise + raw, b"null\n[1]\n" + raw])
            )
    found = gather(tmp_path / "state" / "runs" / "made", NO_ACCOUNTING, NOW + 100)
    Page(page.render(found))
    markdown.markdown(found)
    json.dumps(as_json.as_dict(found), allow_nan=False, default=str)


def test_a_run_that_goes_on_and_one_whose_cluster_is_gone(tmp_path: Path) -> None:
    run = Made(tmp_path, "going", 600.0, 2, 0, 0, 2.0, 50, state="running", load=False).write()
    gone = gather(run, slurm(SlurmUnavailable("silent")), NOW + 5000)
    assert gone.live and gone.state == "running"  # Slurm does not answer: it may well go on
    (tmp_path / "clusters" / "going" / "ended.json").write_text("{}")
    ended = gather(run, NO_ACCOUNTING, NOW + 5000)
    assert ended.state == "interrupted" and not ended.live and ended.until < NOW + 100
    assert ended.book.wall == pytest.approx(ended.axis.seconds, abs=5)


# -- the command -------------------------------------------------------------------------------------------


def test_the_command(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr("raylaunch.scheduler.slurm.client.run", NO_ACCOUNTING._runner)
    shutil.copytree(made.parents[1], tmp_path / "state")
    where = ["--state-dir", str(tmp_path / "state")]
    done = CliRunner().invoke(cli, ["report", "made", *where])
    path = tmp_path / "state" / "runs" / "made" / "report.html"
    assert done.exit_code == 0 and done.output == f"{path}\n" and stat.S_IMODE(path.stat().st_mode) == 0o600
    done = CliRunner().invoke(cli, ["report", "made", "--json", *where])
    assert json.loads(done.output)["run"] == "made"
    done = CliRunner().invoke(cli, ["report", "made", "--markdown", "--html", str(tmp_path / "a.html"), *where])
    assert done.output.startswith("# made") and (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    for words_ in (["nothing"], ["../made"], ["made", "--json", "--markdown"], ["made", "--html", str(tmp_path)]):
        assert isinstance(CliRunner().invoke(cli, ["report", *words_, *where]).exception, UsageError)


# -- pieces --------------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=40)
@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=6), st.floats(0, 1), st.floats(0, 1))
def test_the_axis(spans: list[float], one: float, other: float) -> None:
    at, intervals = 1e9, []
    for span in spans:
        intervals.append((at, at + span))
        at += span + 3600.0
    axis = Axis(intervals)
    low, high = sorted((one, other))
    first, second = (axis.moment(share * axis.seconds) for share in (low, high))
    assert 0 <= axis.x(first) <= axis.x(second) <= WIDTH + 1e-6
    assert axis.elapsed(second) == pytest.approx(high * axis.seconds, abs=1e-3)
    assert len(axis.cuts()) == len(spans) - 1
    assert axis.x(at - 3600.0) == pytest.approx(WIDTH)


def test_pictures_are_sound_xml() -> None:
    axis = Axis([(0.0, 100.0), (1000.0, 1100.0)])
    series = curves.Series()
    for second in range(100):
        series.add(axis.x(second), second, math.sin(second) + 2)
    to = svg.scale([b.high for b in series.in_order()], 100)
    panels = [svg.Panel("a < b", 100, svg.curve(series.in_order(), to, "c-loss", area=True), [(10.0, "1 & 2")])]
    marks = [svg.Mark(100.0, 140.0, "1", 'node "x" <lost>')]
    found = xml.fromstring(svg.timeline(panels, axis, marks, [(0, 10, "x")], "a & b"))
    assert found.get("aria-label") == "a & b" and "a < b" in "".join(found.itertext())
    assert 'node "x" <lost>' in [title.text for title in found.iter("title")]
    xml.fromstring(svg.bar([(1.0, "queue", "a<b"), (0.0, "stop", "")], 10, "x"))
    assert svg.scale([], 10).ticks() and svg.scale([5.0, 5.0], 10).y(5.0) == 5.0
    assert svg.scale([0.01, 3.0, 1000.0], 10, may_log=True).log and not svg.scale([-1.0, 1000.0], 10, may_log=True).log


def test_what_is_shorter_than_a_clock_can_tell_took_no_time() -> None:
    assert [formatting.duration(seconds) for seconds in (0, 1.1e-05, 0.001, 0.25)] == [
        "0 s",
        "0 s",
        "0.001 s",
        "0.25 s",
    ]


@given(st.floats(0, 1e12))
def test_numbers_for_people(value: float) -> None:
    for text in (
        formatting.duration(value),
        formatting.amount(value),
        formatting.hours(value),
        formatting.energy(value),
    ):
        assert text and "e+" not in text
    assert formatting.percent(min(1.0, value)).endswith("%")


def test_numbers_as_they_should_look() -> None:
    seconds = {
        0: "0 s",
        0.42: "0.42 s",
        59.6: "1 min",
        125: "2 min 5 s",
        12000: "3 h 20 min",
        864000: "10 d",
        86340: "23 h 59 min",
    }
    assert {value: formatting.duration(value) for value in seconds} == seconds
    assert (
        formatting.percent(0.9966) == "99.66 %"
        and formatting.percent(0.00001) == "< 0.01 %"
        and formatting.percent(1.0) == "100 %"
    )
    assert (
        formatting.amount(1234567) == "1.23 M" and formatting.amount(8716) == "8,716" and plural(1, "loss") == "1 loss"
    )
    assert [text for _, text in svg.time_ticks(10 * 86400.0)][:3] == ["0", "1 d", "2 d"]
    assert len(svg.time_ticks(1e12)) < 30


def test_no_secret_is_shown() -> None:
    given_ = {
        "slurm": {
            "env": {"A": "literal", "B": "${B}", "C": "x${B}"},
            "setup": ["export HF_TOKEN=hf_abc", "curl -H 'x' https://me:pw@host/path?key=abc", "source env.sh", "login --api-key ${KEY}"],
        },
        "trainer": {"args": ["--lr", "0.1", "--wandb-api-key", "abc", "--password=hunter2", "--tokenizer", "gpt2", "--max-tokens", "7"]},
        "mlflow": {"tracking_uri": "https://u:p@host:5000"},
        "alerts": {"to": ["https://hooks.slack.example/T0/B0/XYZ"], "webhook": "zzz"},
        "model": {"n_kv_heads": 4, "kwargs": {"auth_token": "t0k"}},
    }  # fmt: skip
    shown = settings.without_secrets(given_)
    text = json.dumps(shown)
    for secret in ("literal", "hf_abc", "me:pw", "=abc", '"abc"', "hunter2", "u:p@", "XYZ", "zzz", "t0k", "x${B}"):
        assert secret not in text, secret
    assert shown["slurm"]["env"] == {"A": "(hidden)", "B": "${B}", "C": "(hidden)"}
    assert shown["slurm"]["setup"][2:] == ["source env.sh", "login --api-key ${KEY}"]
    assert shown["trainer"]["args"][-4:] == ["--tokenizer", "gpt2", "--max-tokens", "7"] and "gpt2" in text
    assert shown["model"]["n_kv_heads"] == 4


def test_prices_and_differences() -> None:
    site = CostConfig(gpu_hour=3.0, currency="CHF")
    assert settings.prices({"cost": {"gpu_hour": 2, "node_hour": None, "currency": "EUR"}}, site).gpu_hour == 2
    for own in (None, {}, {"cost": 3}, {"cost": {"gpu_hour": -4}}, {"cost": {"gpu_hour": None, "currency": "EUR"}}):
        assert settings.prices(own, site) == site
    assert settings.differences({"optimizer": {"lr": 0.5, "eps": 1e-8}, "new": {"key": 1, "empty": None}}) == {
        "optimizer.lr": 0.5, "new.key": 1,
    }  # fmt: skip


def test_efficiency_of_a_job_that_goes_on() -> None:
    assert cost.efficiency([]) == (None, None, None)
