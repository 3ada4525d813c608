"""Plain tables: what goes in comes out, row by row, mapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylaunch.data import dataset, inspect, prepare
from raylaunch.data.prepare import PrepareRequest
from raylaunch.data.table import ROWS, Table
from raylaunch.errors import DataError

pytestmark = pytest.mark.usefixtures("in_this_process")


def columns(first: int, count: int) -> pa.Table:
    numbers = range(first, first + count)
    return pa.table({
        "number": pa.array(numbers, pa.int32()),
        "pixels": pa.array([[n, n + 1, n + 2] for n in numbers], pa.list_(pa.float32(), 3)),
        "name": [f"row {n}" if n % 7 else None for n in numbers],
    })  # fmt: skip


@pytest.fixture
def made(tmp_path: Path) -> Path:
    pq.write_table(columns(0, 2500), tmp_path / "a.parquet", row_group_size=700)
    pq.write_table(columns(2500, 30), tmp_path / "b.parquet")
    request = PrepareRequest([str(tmp_path / "*.parquet")], tmp_path / "out", format="table", piece_bytes=1)
    prepare.prepare(request, 1, lambda _: None)
    return tmp_path / "out"


def test_rows_are_taken_in_any_order_from_any_shard(made: Path) -> None:
    table = Table(made)
    assert len(table) == 2530 and len(dataset.read(made).shards) == 5
    picked = np.random.default_rng(0).permutation(2530)[:200]
    rows = table.take(picked)
    assert rows["number"].dtype == np.int32 and rows["number"].tolist() == picked.tolist()
    assert rows["pixels"].shape == (200, 3) and rows["pixels"].dtype == np.float32
    assert (rows["pixels"][:, 2] == picked + 2).all()
    assert rows["name"] == [f"row {n}" if n % 7 else None for n in picked]
    assert table.take([])["number"].shape == (0,)
    with pytest.raises(IndexError, match="row 2530 of 2530"):
        table.take([2530])


def test_large_row_groups_are_cut_into_batches(tmp_path: Path) -> None:
    pq.write_table(columns(0, 3 * ROWS + 5), tmp_path / "a.parquet")
    prepare.prepare(PrepareRequest([str(tmp_path / "a.parquet")], tmp_path / "out", format="table"), 1, lambda _: None)
    last = 3 * ROWS + 4
    assert Table(tmp_path / "out").take([last, 0, ROWS])["number"].tolist() == [last, 0, ROWS]


def test_files_with_other_columns_are_no_table(tmp_path: Path) -> None:
    pq.write_table(columns(0, 3), tmp_path / "a.parquet")
    pq.write_table(columns(0, 3).set_column(0, "number", pa.array([1.0, 2.0, 3.0])), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"a\.parquet.* and .*b\.parquet.* have not the same columns \(number\)"):
        prepare.prepare(
            PrepareRequest([str(tmp_path / "*.parquet")], tmp_path / "out", format="table"), 1, lambda _: None
        )
    assert not (tmp_path / "out" / dataset.MANIFEST).exists()


def test_it_is_shown_and_is_no_text(made: Path, tmp_path: Path) -> None:
    shown = inspect.samples(made, dataset.read(made), 2, 0)
    assert all("number: " in sample.text and "pixels: [" in sample.text for sample in shown)
    assert not dataset.verify(made, dataset.read(made))
    (tmp_path / "a.txt").write_text("text")
    prepare.prepare(PrepareRequest([str(tmp_path / "a.txt")], tmp_path / "text"), 1, lambda _: None)
    with pytest.raises(DataError, match="contains tokens, not a table"):
        Table(tmp_path / "text")
    with pytest.raises(DataError, match="not a Parquet file"):
        prepare.prepare(PrepareRequest([str(tmp_path / "a.txt")], tmp_path / "no", format="table"), 1, lambda _: None)
