"""Tables for custom models: rows of memory-mapped Arrow files with any columns.

raylaunch data prepare 'rows/*.parquet' --out table --format table

table = Table("table")
loop = Loop(config, session, model, optimizer, samples=len(table))
for batch in loop:
    rows = table.take(batch.indices.numpy())       # {"pixels": array [n, 784], "label": array [n], …}
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raylaunch.data import dataset
from raylaunch.data.dataset import Shard
from raylaunch.errors import DataError

ROWS = 1024
"""Rows a record batch, of each but the last of a shard."""
FORMAT = "table"


class Table:
    """A table written by `raylaunch data prepare --format table`. Files are memory-mapped on first use."""

    def __init__(self, directory: Path | str) -> None:
        """`directory`: the --out directory. Raises DataError if it does not contain a table."""
        self._directory = Path(directory)
        manifest = dataset.read(self._directory)
        if manifest.format != FORMAT:
            raise DataError(f"{directory} contains tokens, not a table", "Prepare it with --format table.")
        self._shards = manifest.shards
        self._starts = [0, *itertools.accumulate(shard.documents for shard in self._shards)]
        self._files: dict[int, pa.ipc.RecordBatchFileReader] = {}
        self.schema: pa.Schema = self._file(0).schema

    def __len__(self) -> int:
        return self._starts[-1]

    def take(self, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> dict[str, Any]:
        """The rows at `indices` [n], by column: arrays [n] for numbers, [n, k] for lists of equal length k, Python lists for
        everything else."""
        rows = [self._row(int(index)) for index in indices]
        table = pa.Table.from_batches(rows, self.schema)
        return {name: _plain(table.column(name)) for name in table.column_names}

    def _row(self, index: int) -> pa.RecordBatch:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        batch, row = divmod(index - self._starts[shard], ROWS)
        return self._file(shard).get_batch(batch).slice(row, 1)

    def _file(self, shard: int) -> pa.ipc.RecordBatchFileReader:
        if shard not in self._files:
            self._files[shard] = dataset.mapped(self._directory / f"{self._shards[shard].name}.arrow")
        return self._files[shard]


def check(directory: Path, shards: Sequence[Shard]) -> None:
    """DataError when the shards have not the same columns."""
    first: tuple[Shard, pa.Schema] | None = None
    for shard in shards:
        schema = dataset.mapped(directory / f"{shard.name}.arrow").schema
        if first is not None and not schema.equals(first[1]):
            differs = ", ".join(sorted({field.name for field in {*schema} ^ {*first[1]}})) or "their order"
            raise DataError(
                f"{first[0].source} and {shard.source} have not the same columns ({differs})",
                "Prepare them into a table each, or make them alike.",
            )
        first = first or (shard, schema)


def _plain(column: pa.ChunkedArray) -> Any:
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return column.to_numpy()
    values = column.to_pylist()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = kind.value_type
        even = len({None if value is None else len(value) for value in values}) == 1
        if even and values[0] is not None and (pa.types.is_integer(inner) or pa.types.is_floating(inner)):
            return np.array(values, inner.to_pandas_dtype())
    return values


def write(directory: Path, name: str, source: str, rows: pa.Table) -> Shard:
    """The rows as one shard."""
    part = directory / f".{name}.arrow.tmp"
    sink = dataset.HashingFile(part)
    try:
        with pa.ipc.new_file(sink, rows.schema) as out:
            for batch in rows.combine_chunks().to_batches(max_chunksize=ROWS):
                out.write_batch(batch)
        sink.finish()
        part.replace(directory / f"{name}.arrow")
    except BaseException:
        sink.close()
        part.unlink(missing_ok=True)
        raise
    file = f"{name}.arrow"
    return Shard(name, source, 0, rows.num_rows, 0, 0, {file: sink.size}, {file: sink.sha256})
