"""Documents → a prepared dataset: cutting, reading, writing, resuming, and what is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from raylaunch.cli.data import inspect
from raylaunch.data import dataset, prepare, sources, tokenize
from raylaunch.data import inspect as looking
from raylaunch.data.dataset import Manifest, ShardWriter
from raylaunch.data.prepare import PrepareProgress, PrepareRequest
from raylaunch.data.sources import BadDocument, Piece
from raylaunch.data.storage import File
from raylaunch.errors import DataError, UsageError

pytestmark = pytest.mark.usefixtures("in_this_process")


def lines(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def all_documents(files: list[Path], size: int) -> list[object]:
    inputs = [File.of(path) for path in files]
    return [d for piece in sources.pieces(inputs, None, size) for d in sources.documents(piece, "text")]


def texts(directory: Path) -> list[str]:
    """Every document of a dataset, decoded."""
    manifest, found = dataset.read(directory), []
    for shard in manifest.shards:
        row = dataset.row(directory, [shard])
        for index in range(shard.documents):
            start, stop = dataset.document(directory, shard, index)
            found.append(tokenize.Bytes().decode(row.read(start, stop - start)))
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=40), max_size=30), st.integers(1, 200))
def test_json_lines_cut_anywhere_are_the_same_documents(tmp_path_factory: pytest.TempPathFactory, rows: list[str], size: int) -> None:  # fmt: skip
    path = lines(tmp_path_factory.mktemp("cut") / "a.jsonl", [{"text": row} for row in rows])
    assert all_documents([path], size) == rows


def test_parquet_is_cut_by_row_groups_and_gzip_is_not_cut(tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(100)]
    pq.write_table(pa.table({"text": [*rows, None, ""]}), tmp_path / "a.parquet", row_group_size=10)
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress(b"".join(json.dumps({"text": r}).encode() + b"\n" for r in rows))
    )
    cut = sources.pieces([File.of(tmp_path / name) for name in ("a.parquet", "b.jsonl.gz")], None, 1)
    assert [(piece.start, piece.stop) for piece in cut] == [*((i, i + 1) for i in range(11)), (0, 0)]
    assert all_documents([tmp_path / "a.parquet", tmp_path / "b.jsonl.gz"], 1) == rows + rows


def test_small_texts_share_a_piece(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("x" * 10)
    (tmp_path / ".hidden").write_text("no")
    files = sources.list_files([str(tmp_path), str(tmp_path / "1.txt")])
    assert [len(piece.files) for piece in sources.pieces(files, None, 20)] == [2, 2, 1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> None:
    directory, before = tmp_path_factory.mktemp("shard"), dataset.BATCH_TOKENS
    dataset.BATCH_TOKENS = 16
    try:
        writer = ShardWriter(directory, "shard-00000", "uint16", ("tokens", "loss"))
        documents = [np.arange(length, dtype=np.uint16) + 100 * number for number, length in enumerate(lengths)]
        for document in documents:
            writer.add(document, (document % 2).astype(np.uint8))
        shard = writer.close("here", 0)
        row, loss = dataset.row(directory, [shard]), dataset.row(directory, [shard], "loss")
        assert (shard.tokens, shard.documents) == (sum(lengths), len(lengths))
        assert shard.answered == sum(int((document % 2).sum()) for document in documents)
        assert row.read(0, shard.tokens).tolist() == np.concatenate(documents).tolist()
        for index, document in enumerate(documents):
            start, stop = dataset.document(directory, shard, index)
            assert row.read(start, stop - start).tolist() == document.tolist()
            assert loss.read(start, stop - start).tolist() == (document % 2).tolist()
    finally:
        dataset.BATCH_TOKENS = before


def make(out: Path, *inputs: Path, **more: object) -> Manifest:
    return prepare.prepare(PrepareRequest([str(path) for path in inputs], out, **more), 1, lambda _: None)  # type: ignore[arg-type]


def test_a_conversation_counts_its_answers(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]},
        {"prompt": "ping", "completion": "pong"},
    ]
    manifest = make(tmp_path / "out", lines(tmp_path / "a.jsonl", rows), format="sft")
    assert manifest.format == "sft" and manifest.documents == 2
    assert manifest.shards[0].answered == 2 * len("pong\n\0")  # with the end of each
    shown = looking.samples(tmp_path / "out", manifest, 5, 0)
    assert {sample.text for sample in shown} == {"<|user|>\nping\n<|assistant|>\n⟦pong\n⟧"}


BAD = [
    ("{", "no JSON"),
    ("[1]", "no JSON object"),
    ('{"body": "x"}', "(there are: body)"),
]


@pytest.mark.parametrize(("line", "why"), BAD)
def test_a_bad_line_is_named_or_left_out(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + '\n{"text": "too"}\n')
    with pytest.raises(DataError, match="byte 17") as caught:
        make(tmp_path / "out", path)
    assert why in caught.value.message and "--skip-bad" in caught.value.hint
    seen: list[PrepareProgress] = []
    manifest = prepare.prepare(PrepareRequest([str(path)], tmp_path / "out", skip_bad=True), 1, seen.append)
    assert (manifest.documents, manifest.skipped) == (2, 1)
    assert [type(bad) for bad in seen[-1].bad] == [BadDocument] and texts(tmp_path / "out") == ["good", "too"]


def test_conversations_without_an_answer_are_bad(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "ping"}]}
    with pytest.raises(DataError, match="no answer"):
        make(tmp_path / "out", lines(tmp_path / "a.jsonl", [row]), format="sft")


def test_what_is_finished_is_kept_and_other_input_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": f"document {number}"} for number in range(50)])
    out, small = tmp_path / "out", {"piece_bytes": 200}
    whole = make(out, path, **small)
    assert len(whole.shards) > 3
    for name in ("manifest.json", "shard-00001.json"):  # as if it had been cut off there
        (out / name).unlink()
    kept = (out / "shard-00000.arrow").stat().st_mtime_ns
    assert make(out, path, **small) == whole and (out / "shard-00000.arrow").stat().st_mtime_ns == kept
    assert texts(out) == [f"document {number}" for number in range(50)]
    with pytest.raises(UsageError, match="different: pieces"):
        make(out, path, piece_bytes=300)
    lines(path, [{"text": "other"}])
    with pytest.raises(UsageError, match="different: files, pieces"):
        make(out, path, **small)


def test_a_directory_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        make(tmp_path / "out", lines(tmp_path / "a.jsonl", [{"text": "x"}]))


def test_damage_is_found(tmp_path: Path) -> None:
    manifest = make(tmp_path / "out", lines(tmp_path / "a.jsonl", [{"text": "hello"}]))
    assert "verified: 2 files, as written\n" in CliRunner().invoke(inspect, [str(tmp_path / "out"), "--verify"]).output
    file = tmp_path / "out" / "shard-00000.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert dataset.verify(tmp_path / "out", dataset.read(tmp_path / "out")) == [file.name] and manifest.documents == 1
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match="bytes instead of"):
        dataset.read(tmp_path / "out")
    with pytest.raises(DataError, match="holds no prepared dataset"):
        dataset.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.parquet", b"no parquet", "is not a Parquet file"),
        ("a.jsonl.gz", b"no gzip", "cannot read"),
        ("a.txt", b"", "contains no documents"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        make(tmp_path / "out", tmp_path / name)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text'; it has: body"):
        make(tmp_path / "out", tmp_path / "a.parquet")
    assert make(tmp_path / "out", tmp_path / "a.parquet", column="body").documents == 1


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no tokenizer|needs the package"):
        make(tmp_path / "out", lines(tmp_path / "a.jsonl", [{"text": "x"}]), tokenizer=str(tmp_path / "nothing.json"))


def test_a_trained_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    spec = str(tmp_path / "tokenizer.json")
    manifest = make(tmp_path / "out", lines(tmp_path / "a.jsonl", [{"text": "a b c"}, {"text": "b"}]), tokenizer=spec)
    row = dataset.row(tmp_path / "out", manifest.shards)
    assert row.read(0, 6).tolist() == [1, 2, 3, 0, 2, 0] and manifest.tokenizer["separator"] == 0
    assert manifest.dtype == "uint16"
    assert looking.samples(tmp_path / "out", manifest, 2, 0)[1].text == "b"
    inner.add_tokens(["new"])
    inner.save(spec)
    with pytest.raises(DataError, match="not the one"):
        looking.samples(tmp_path / "out", manifest, 1, 0)


def test_a_piece_says_where_it_is_from() -> None:
    assert Piece("text", ("/a", "/b", "/c"), 0, 0, 3).source == "/a and 2 more"
    assert Piece("jsonl", ("/a",), 5, 9, 4).source == "/a [5, 9)"
