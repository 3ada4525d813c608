"""What the trainer reads: text, prepared datasets, mixtures, conversations."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from attempts import GLOBAL_BATCH_SIZE, Run, Workers, assert_same_curve, prepared
from torch.nn import functional as F

from raylaunch.config.schema import Config
from raylaunch.data import dataset, sample_order
from raylaunch.errors import RunError
from raylaunch.state import files
from raylaunch.trainers import batches as data
from raylaunch.trainers import datasets, fsdp, parallel, text_corpus
from raylaunch.trainers.decoder import Decoder


@pytest.mark.long
def test_missing_text_is_an_error_on_every_rank(run: Run, tmp_path: Path) -> None:
    run.config["data"]["text"] = [str(tmp_path / "nothing")]
    for error in run.attempt(3):
        assert error.startswith("RunError") and "nothing matches" in error


@pytest.mark.long
def test_too_little_text_is_an_error_on_every_rank(run: Run) -> None:
    run.config["data"]["seq_len"] = 100_000
    for error in run.attempt(2):
        assert error.startswith("RunError") and "data.seq_len" in error


# The corpus alone: no workers, no torch.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "text"
    (root / "b").mkdir(parents=True)
    (root / "b" / "two.txt").write_bytes(b"second")
    (root / "a.txt").write_bytes(b"first")
    (root / "c.md").write_bytes(b"third")
    (root / "empty.txt").touch()
    (root / ".hidden").write_bytes(b"never")
    return root


def read_tokens(built: text_corpus.Store) -> list[int]:
    import pyarrow as pa

    with pa.memory_map(str(built.path)) as source:
        return [t for batch in pa.ipc.open_file(source).read_all().column("tokens").chunks for t in batch.to_pylist()]


def test_documents_are_separated_and_in_order_of_their_names(folder: Path, tmp_path: Path) -> None:
    built = text_corpus.build(tmp_path / "data", [str(folder)], attempt=1)
    expected = [*b"first", 256, *b"second", 256, *b"third", 256]
    assert read_tokens(built) == expected and built.tokens == len(expected)
    assert text_corpus.find(tmp_path / "data", [str(folder)]) == built
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["manifest.json", "tokens.arrow"]
    manifest = files.read_json(tmp_path / "data" / "manifest.json")
    assert [Path(d["path"]).name for d in manifest["documents"]] == ["a.txt", "two.txt", "c.md"]


def test_globs_and_entries_that_overlap(folder: Path) -> None:
    found = text_corpus.list_files([str(folder / "*.md"), str(folder / "**" / "*.txt"), str(folder)])
    assert [p.name for p in found] == ["c.md", "a.txt", "two.txt", "empty.txt"]


def test_a_store_of_many_batches_reads_as_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "BATCH_TOKENS", 4)
    built = text_corpus.build(tmp_path / "data", [str(folder)], attempt=1)
    tokens, whole = dataset.Row([(built.path, built.tokens)]), read_tokens(built)
    for start in range(built.tokens):
        for length in range(1, built.tokens - start + 1):
            assert tokens.read(start, length).tolist() == whole[start : start + length]


def test_a_prepared_dataset_reads_as_one_row(tmp_path: Path) -> None:
    rows = [f"document {number}" for number in range(40)]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    manifest = datasets.prepared(Path(prepared(lines, tmp_path / "out", piece_bytes=100)), 264)
    row = dataset.row(tmp_path / "out", manifest.shards)
    whole = [token for text in rows for token in (*text.encode(), 256)]
    assert len(manifest.shards) > 5 and row.count == len(whole)
    for start in range(0, row.count, 7):
        for length in (1, min(30, row.count - start), row.count - start):
            assert row.read(start, length).tolist() == whole[start : start + length]


@pytest.mark.long
def test_training_on_a_prepared_dataset(run: Run, straight: Run, text: Path, tmp_path: Path) -> None:
    """The same tokens are the same losses, and another dataset is refused when a run goes on."""
    run.config["data"] = {"prepared": prepared(text, tmp_path / "out"), "seq_len": 32, "val_fraction": 0.1}
    assert_same_curve(run.train(2), straight, rel=0.0)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("bottles", "BOTTLES"))
    run.config["data"]["prepared"] = prepared(other, tmp_path / "second")
    run.config["step_scheduler"]["max_steps"] = 12
    assert all("was written with different data settings" in error for error in run.attempt(2))


def test_a_dataset_that_does_not_fit_the_model(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("x" * 100)
    with pytest.raises(RunError, match=r"model\.vocab_size to 320"):
        datasets.prepared(Path(prepared(text, tmp_path / "out")), 256)


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loaders(run: Run, world_size: int) -> list[data.Loader]:
    """Of all ranks, as the trainer makes them."""
    config = Config.model_validate(run.config)
    sessions = [run.session(rank, world_size) for rank in range(world_size)]
    places = [parallel.MeshCoordinates.of(config, rank, world_size) for rank in range(world_size)]
    return [
        fsdp.make_loader(config, session, datasets.open_data(config, session), place, pin=False)
        for session, place in zip(sessions, places, strict=True)
    ]


def step_of(loaders: list[data.Loader], step: int) -> list[list[int]]:
    """The inputs of a step's samples, in order, whoever has them."""
    batches = [batch for loader in loaders for batch in loader.training(step)]
    return [row for batch in batches for row in batch.inputs[: batch.samples].tolist()]


@pytest.fixture
def mixed(run: Run, text: Path, tmp_path: Path) -> Run:
    """Three parts of bottles and one of digits."""
    digits = tmp_path / "digits.txt"
    digits.write_text("0123456789" * 300)
    out = {prepared(text, tmp_path / "bottles"): 3.0, prepared(digits, tmp_path / "ten"): 1.0}
    run.config["data"] = {"mixture": out, "seq_len": 32, "val_fraction": 0.1}
    return run


def test_a_mixture_has_its_proportions_at_any_size(mixed: Run) -> None:
    alone, shared = loaders(mixed, 1), loaders(mixed, 3)
    digits = total = 0
    for step in range(50):
        rows = step_of(alone, step)
        assert rows == step_of(shared, step)
        digits += sum(max(row) <= ord("9") or row.count(256) == 1 for row in rows)
        total += len(rows)
    assert total == 50 * GLOBAL_BATCH_SIZE and digits == pytest.approx(total / 4, abs=40)
    for loader in alone + shared:
        loader.close()


def test_training_on_a_mixture(mixed: Run, tmp_path: Path, workers: Workers) -> None:
    """Bitwise the same when it goes on, within the order of additions at another size; other weights are refused."""
    other = Run(tmp_path / "other", tmp_path, workers)
    files.make_dir(other.directory)
    other.config = mixed.config
    assert_same_curve(mixed.train(2, stop_at=5).train(3), other.train(2))
    assert fsdp.check(Config.model_validate(mixed.config))[1].endswith("75.0% of what is read")
    weights = mixed.config["data"]["mixture"]
    mixed.config["data"]["mixture"] = {**weights, next(iter(weights)): 4.0}
    mixed.config["step_scheduler"]["max_steps"] = 12
    assert all("was written with different data settings" in error for error in mixed.attempt(2))


@pytest.mark.long
def test_a_dataset_of_its_own_to_validate_on(run: Run, straight: Run, text: Path, tmp_path: Path) -> None:
    """Nothing of the text is held out then."""
    other = tmp_path / "other.txt"
    other.write_text("abcdefgh" * 500)
    run.config["data"] |= {"validation": prepared(other, tmp_path / "other")}
    run.train(2)
    assert run.metrics("loss") != straight.metrics("loss")
    assert list(run.metrics("val_loss")) == [5, 10] and run.metrics("val_loss")[10] > straight.metrics("val_loss")[10]
    (only,) = loaders(run, 1)
    held_out = [row for batch in only.validation(1) for row in batch.inputs[: batch.samples].tolist()]
    assert len(held_out) == GLOBAL_BATCH_SIZE and {t for row in held_out for t in row} <= {*b"abcdefgh", 256}
    only.close()


def test_two_tokenizers_do_not_mix(run: Run, text: Path, tmp_path: Path) -> None:
    one, other = (prepared(text, tmp_path / name) for name in ("one", "other"))
    manifest = files.read_json(Path(other) / dataset.MANIFEST)
    manifest["tokenizer"] |= {"name": "another", "sha256": "1"}
    files.write_json(Path(other) / dataset.MANIFEST, manifest)
    for section in ({"mixture": {one: 1.0, other: 1.0}}, {"prepared": one, "validation": other}, {"validation": other}):
        run.config["data"] = section
        with pytest.raises(RunError, match=r"different tokenizers \(.*another"):
            fsdp.check(Config.model_validate(run.config))


@pytest.mark.long
def test_the_loss_counts_the_answers_alone_and_conversations_do_not_see_each_other(run: Run, tmp_path: Path) -> None:
    """Gradients too: those of the mean over what counts, whoever has how much of it."""
    rows = [{"prompt": f"{n} and {n}?", "completion": f"That is {2 * n}."} for n in range(300)]
    run.config["data"] = {
        "prepared": prepared(lines(tmp_path / "a.jsonl", rows), tmp_path / "talk", format="sft"),
        "seq_len": 48, "val_fraction": 0.1,
    }  # fmt: skip
    run.config["optimizer"]["max_grad_norm"] = None
    run.train(1)
    (loader,) = loaders(run, 1)
    config = Config.model_validate(run.config)
    model = Decoder(config.model)
    for name, parameter in model.named_parameters():
        std = model.init_std(name)
        generator = parallel._generator(0, name, torch.device("cpu"))
        parameter.data.normal_(std=std, generator=generator) if std else parameter.data.fill_(1.0)
    losses, answers = [], set()
    for batch in loader.training(0):
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            for start, stop in pieces(inputs):  # each conversation by itself
                model.settle(stop - start, torch.device("cpu"))
                logits = model(torch.tensor([inputs[start:stop]]))[0]
                aim = torch.tensor(targets[start:stop])
                losses += [F.cross_entropy(row, t) for row, t in zip(logits, aim, strict=True) if t >= 0]
                answers |= {bytes(t for t in targets[start:stop] if 0 <= t < 256)}
    assert any(answer.startswith(b"That is ") and answer.endswith(b".\n") for answer in answers)
    assert all(b"and" not in answer and b"|" not in answer for answer in answers)
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert run.metrics("loss")[1] == pytest.approx(loss.item(), rel=1e-5)
    assert run.metrics("grad_norm")[1] == pytest.approx(norm.item(), rel=1e-4)
    loader.close()


def pieces(inputs: list[int]) -> list[tuple[int, int]]:
    """Where the documents of a sample begin and end."""
    ends = [at + 1 for at, token in enumerate(inputs) if token == 256]
    cuts = [0, *ends, len(inputs)]
    return [(a, b) for a, b in itertools.pairwise(cuts) if b > a]


def test_conversations_are_the_same_at_any_size_and_under_any_plan(run: Run, tmp_path: Path, workers: Workers) -> None:
    rows = [{"prompt": f"{n} and {n}?", "completion": f"That is {2 * n}." * (n % 5 + 1)} for n in range(300)]
    path = prepared(lines(tmp_path / "a.jsonl", rows), tmp_path / "talk", format="sft")
    run.config["data"] = {"prepared": path, "seq_len": 48, "val_fraction": 0.1}
    other = Run(tmp_path / "other", tmp_path, workers)
    files.make_dir(other.directory)
    other.config = {**run.config, "distributed": {"cp_size": 2, "tp_size": 2}}
    assert_same_curve(run.train(3), other.train(4))


@pytest.mark.long
def test_a_billion_samples_are_read_like_a_few(run: Run, text: Path, tmp_path: Path) -> None:
    """One shard under sixty thousand names: nothing is as large as the data."""
    shard = dataset.BATCH_TOKENS
    built = tmp_path / "many.txt"
    built.write_bytes(bytes(range(97, 107)) * (shard // 10 + 1))
    directory = Path(prepared(built, tmp_path / "out"))
    (one,) = dataset.read(directory).shards
    names = [(directory / f"{one.name}.arrow", one.tokens)] * (10**9 * 32 // one.tokens + 1)
    tracemalloc.start()
    row = dataset.Row(names)
    samples = datasets.sample_count(row.count, 32)
    source = datasets.Source(row, None, samples, 0)
    everything = datasets.Data((source,), (source,), sample_order.quotas([1.0]), 256, False, {})
    loader = data.Loader(everything, data.Plan(32, 0, 256, 8, 0, 1), pin=False)
    rows = [r for step in (0, 10**6) for batch in loader.training(step) for r in batch.inputs.tolist()]
    loader.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert samples >= 10**9 and len(rows) == 512 and all(len(set(r)) >= 10 for r in rows)
    assert peak < 16 << 20


def test_the_standard_library_has_its_sources_and_no_tests() -> None:
    names = {path.name for path in text_corpus.list_files(["stdlib:"])}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not any("site-packages" in path.parts for path in text_corpus.list_files(["stdlib:"]))


def test_a_damaged_or_foreign_store_is_refused(folder: Path, tmp_path: Path) -> None:
    directory, text = tmp_path / "data", [str(folder)]
    built = text_corpus.build(directory, text, attempt=1)
    with pytest.raises(RunError, match="was built from"):
        text_corpus.find(directory, ["stdlib:"])
    with built.path.open("ab") as out:
        out.write(b"x")
    with pytest.raises(RunError, match="damaged"):
        text_corpus.find(directory, text)


def test_the_others_hear_of_an_error_or_of_silence(tmp_path: Path) -> None:
    text = [str(tmp_path / "nothing")]
    with pytest.raises(RunError, match="no sign of life"):
        text_corpus.prepare(tmp_path / "data", text, rank=1, attempt=1, silence=0.0)
    with pytest.raises(RunError, match="nothing matches"):
        text_corpus.prepare(tmp_path / "data", text, rank=0, attempt=1, silence=0.0)
    with pytest.raises(RunError, match=r"rank 0: .*nothing matches"):
        text_corpus.prepare(tmp_path / "data", text, rank=1, attempt=1, silence=9.0)


def test_text_that_may_not_be_read_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(text_corpus, "_READ_BYTES", 1)
        patch.setattr(text_corpus, "_chunks", lambda *_: iter(()))
        with pytest.raises(RunError, match="empty"):
            text_corpus.build(tmp_path / "data", [str(folder)], attempt=1)
    found = text_corpus.list_files([str(folder)])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(RunError, match=r"cannot read .*a\.txt: Permission denied"):
            list(text_corpus._chunks(found, [], lambda: None))
