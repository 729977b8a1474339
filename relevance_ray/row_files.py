"""Files of rows: Parquet, CSV and JSON lines, streamed in and out, so that a file larger than memory goes through.

CSV and JSON lines are read by the standard library, not by Arrow: cells stay the text they were ("007", "1.0"), and an
error can name its row. That costs a few microseconds a row, nothing beside a model. Parquet to Parquet passes Arrow
columns through untouched. A row's number counts from 1 and leaves the CSV header out.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from relevance_ray.errors import UserError

FileFormat = Literal["parquet", "csv", "tsv", "jsonl"]
FORMATS: dict[str, FileFormat] = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
_DELIMITER = {"csv": ",", "tsv": "\t"}
_MAX_CELL = 2**31 - 1


def file_format(path: Path) -> FileFormat:
    """The format by the file's ending; `UserError` for one that is not known."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: its ending says nothing about its format; use one of {', '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()]


def check_text(batch: pa.RecordBatch, path: str | Path, first_row: int) -> None:
    """Refuse text that is no UTF-8, which Arrow reads from Parquet without a word; `UserError` names row and column."""
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for row, value in enumerate(column, start=first_row):
                try:
                    value.as_py()
                except UnicodeDecodeError:
                    raise UserError(f"{path}, row {row}: {name} is no UTF-8 text; mend it or drop the row") from error
        raise


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of a file, the first being number `first_row`. `table` is there when the file is Parquet."""

    first_row: int
    rows: list[dict[str, Any]]
    table: pa.Table | None = None


@dataclass
class RowReader:
    """Streams the rows of one file, as often as asked.

    Attributes:
        path: a local file; its ending decides the format.
        columns: the column names; for JSON lines those seen by the passes made so far, in order of appearance.
        schema: the Arrow schema; of a CSV every column is text, of JSON lines it widens as `batches` goes, and is None
            once no schema holds what was read.

    Raises `UserError` for a file that does not exist, is not what its ending says, or breaks off in some row.
    """

    path: Path
    columns: list[str] = field(init=False, default_factory=list)
    schema: pa.Schema | None = field(init=False, default_factory=lambda: pa.schema([]))

    def __post_init__(self) -> None:
        self.format = file_format(self.path)
        if not self.path.is_file():
            raise UserError(f"{self.path} is no file; check the path")
        if self.format == "parquet":
            self.schema = self._open_parquet().schema_arrow
            self.columns = list(self.schema.names)
        elif self.format != "jsonl":
            with self.path.open(encoding="utf-8-sig", newline="") as stream:
                self.columns = next(self._csv_rows(stream), [])
            self.schema = pa.schema([(name, pa.string()) for name in self.columns])
        repeated = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if repeated:
            raise UserError(f"{self.path} has the column {repeated[0]!r} twice; rename one of them")

    def batches(self, batch_rows: int, columns: Sequence[str] | None = None) -> Iterator[Batch]:
        """Batches of at most `batch_rows` rows. `columns` limits what is decoded into `rows`, never `table`."""
        if self.format == "parquet":
            yield from self._parquet_batches(batch_rows, columns)
            return
        rows = self._jsonl() if self.format == "jsonl" else self._csv()
        first_row = 1
        while batch := list(itertools.islice(rows, batch_rows)):
            if self.format == "jsonl":
                self._widen(batch)
            yield Batch(first_row, batch)
            first_row += len(batch)

    def _open_parquet(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{self.path} is no readable Parquet file ({_first_line(error)}); write it again"
            ) from error

    def _parquet_batches(self, batch_rows: int, columns: Sequence[str] | None) -> Iterator[Batch]:
        first_row = 1
        with self._open_parquet() as file:
            batches = file.iter_batches(batch_rows)
            while True:
                try:
                    batch = next(batches, None)
                except (pa.ArrowInvalid, OSError) as error:
                    reason = _first_line(error)
                    raise UserError(
                        f"{self.path} breaks off after row {first_row - 1} ({reason}); write it again"
                    ) from error
                if batch is None:
                    return
                check_text(batch, self.path, first_row)
                table = pa.Table.from_batches([batch])
                wanted = table if columns is None else table.select(list(columns))
                yield Batch(first_row, wanted.to_pylist(maps_as_pydicts="lossy"), table)
                first_row += table.num_rows

    def _csv_rows(self, stream: IO[str]) -> Iterator[list[str]]:
        csv.field_size_limit(_MAX_CELL)
        reader = csv.reader(stream, delimiter=_DELIMITER[self.format], strict=True)
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise UserError(f"{self.path}, line {reader.line_num}: {error}; quote the cell properly") from error
            except UnicodeDecodeError as error:
                raise UserError(f"{self.path} is not UTF-8 after line {reader.line_num}; save it as UTF-8") from error
            if row is None:
                return
            if row:
                yield row

    def _csv(self) -> Iterator[dict[str, Any]]:
        with self.path.open(encoding="utf-8-sig", newline="") as stream:
            for number, cells in enumerate(itertools.islice(self._csv_rows(stream), 1, None), start=1):
                if len(cells) != len(self.columns):
                    raise UserError(
                        f"{self.path}, row {number}: {len(cells)} cells but {len(self.columns)} columns; "
                        "quote cells that hold the delimiter"
                    )
                yield dict(zip(self.columns, cells, strict=True))

    def _jsonl(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(
                        f"{self.path}, line {number}: no JSON ({error}); write one object a line"
                    ) from error
                if not isinstance(row, dict):
                    raise UserError(f"{self.path}, line {number}: not a JSON object; write one object a line")
                yield row

    def _widen(self, rows: list[dict[str, Any]]) -> None:
        names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        self.columns.extend(name for name in names if name not in set(self.columns))
        if self.schema is None:
            return
        try:
            seen = pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in names])
            self.schema = pa.unify_schemas([self.schema, seen], promote_options="permissive")
        except (ValueError, TypeError, OverflowError):  # Arrow's own errors are kinds of these
            self.schema = None  # mixed types or no valid text: fine as JSON lines, refused where Parquet is asked for


class RowWriter:
    """Writes rows beside `path` and renames the whole file into place on a clean exit; on an error nothing is left.

    Args:
        path: where the finished file goes; its ending decides the format; the folder is made.
        reader: the file the rows come from (its columns and types lead the output's).
        extra: names and Arrow types of the columns added at the end.
    """

    def __init__(self, path: Path, reader: RowReader, extra: dict[str, pa.DataType]) -> None:
        self.path = path
        self.format = file_format(path)
        self.columns = [*reader.columns, *extra]
        self._extra = extra
        self._schema: pa.Schema | None = None
        if self.format == "parquet":
            if reader.schema is None:
                raise UserError(
                    f"{reader.path} mixes types within a column, so {path.name} cannot be Parquet; write .jsonl"
                )
            self._schema = reader.schema
            for name, kind in extra.items():
                self._schema = self._schema.append(pa.field(name, kind))

    def __enter__(self) -> RowWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        os.close(handle)
        self._staged = Path(name)
        self._parquet: pq.ParquetWriter | None = None
        self._text: IO[str] | None = None
        if self._schema is not None:
            try:
                self._parquet = pq.ParquetWriter(self._staged, self._schema)
            except pa.ArrowNotImplementedError as error:
                self._staged.unlink()
                raise UserError(f"{self.path}: {_first_line(error)}; write .jsonl instead") from error
        else:  # a lone surrogate read from "\ud800" is written back as that very escape, which is valid JSON
            self._text = self._staged.open("w", encoding="utf-8", errors="backslashreplace", newline="")
            if self.format != "jsonl":
                self._csv = csv.writer(self._text, delimiter=_DELIMITER[self.format], lineterminator="\n")
                self._csv.writerow(self.columns)
        return self

    def write(self, batch: Batch, extra: dict[str, Sequence[Any]]) -> None:
        """Append a batch's rows with their added columns (each as long as the batch)."""
        assert list(extra) == list(self._extra)
        assert all(len(column) == len(batch.rows) for column in extra.values())
        if self._parquet is not None and self._schema is not None:
            given = self._schema.names[: -len(extra)]
            table = batch.table
            if table is None:
                columns = [
                    pa.array([row.get(name) for row in batch.rows], self._schema.field(name).type) for name in given
                ]
                table = pa.table(columns, names=given)
            arrays = [pa.array(column, self._extra[name]) for name, column in extra.items()]
            self._parquet.write_table(pa.table([*table.columns, *arrays], schema=self._schema))
            return
        assert self._text is not None
        for index, row in enumerate(batch.rows):
            full = row | {name: column[index] for name, column in extra.items()}
            if self.format == "jsonl":
                self._text.write(json.dumps(full, ensure_ascii=False, default=str) + "\n")
            else:
                self._csv.writerow([_cell(full.get(name)) for name in self.columns])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stream = self._parquet or self._text
        try:
            if stream is not None:
                stream.close()
            if kind is None:
                umask = os.umask(0)
                os.umask(umask)
                self._staged.chmod(0o666 & ~umask)  # mkstemp's 0600 would surprise whoever reads the file next
                os.replace(self._staged, self.path)
        finally:
            self._staged.unlink(missing_ok=True)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else value


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
