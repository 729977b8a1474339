"""Files as streams of Arrow tables: Parquet, delimited text and JSON lines, with errors that name file and row.

Text files are read as text: no type is guessed, so an id "007" stays "007"; an empty cell is null. Only the columns asked
for are decoded. JSON lines are parsed in Python, the slow path, because their objects (attributes) have free keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from relevance_ray.data.source import BLOCK_ROWS
from relevance_ray.errors import UserError
from relevance_ray.row_files import RowReader, check_text
from relevance_ray.schema import PRODUCT, QUERY
from relevance_ray.storage import localize

_CSV_BLOCK_BYTES = 1 << 26
_MAX_FREQUENCY = 2.0**53
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".parquet", *DELIMITERS, *JSON_LINES)


def existing(path: str | Path) -> Path:
    """The path, if there is a file there; otherwise `UserError`."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; check data.path and the file's name")
    if not path.is_file():
        raise UserError(f"{path} is a folder where a file is expected; give the file's own path")
    return path


def blocks(
    path: str | Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    *,
    delimiter: str | None = None,
    encoding: str = "utf-8",
) -> Iterator[pa.Table]:
    """Streams the named columns of one file as tables of at most `BLOCK_ROWS` rows; the suffix says the layout.

    Optional columns that the file lacks are absent from the tables. Columns of delimited text are strings; those of
    Parquet keep their type; those of JSON lines are Python values in `pa` inferred per column only where it can be done.

    Raises:
        UserError: no such file, not readable as what its suffix says, or a required column missing.
    """
    path = existing(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path, required, optional)
    if suffix in DELIMITERS:
        return _delimited(path, required, optional, delimiter or DELIMITERS[suffix], encoding)
    if suffix in JSON_LINES:
        return _json_lines(path, required, optional)
    raise UserError(f"{path}: unknown suffix {suffix!r}; use one of {', '.join(SUFFIXES)}")


def read(path: str | Path, required: Sequence[str], optional: Sequence[str] = (), **layout: Any) -> pa.Table:
    """The whole file as one table; see `blocks`. The columns are all cast to strings, except lists."""
    names = [*required, *optional]
    tables = []
    for block in blocks(path, required, optional, **layout):
        present = [name for name in names if name in block.column_names]
        columns = [
            block[name]
            if pa.types.is_list(block[name].type) or pa.types.is_large_list(block[name].type)
            else text(block, name)
            for name in present
        ]
        tables.append(pa.table(columns, names=present))
    if not tables:
        return pa.table({name: pa.array([], pa.string()) for name in required})
    return pa.concat_tables(tables, promote_options="permissive")


def text(table: pa.Table, name: str) -> pa.ChunkedArray:
    """Column `name` as strings, empty and absent values null; all null where the table lacks the column."""
    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows, pa.string())])
    column = table[name].cast(pa.string())
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), pa.scalar(None, pa.string()), column)


def number(table: pa.Table, name: str, path: str | Path, first_row: int = 1) -> pa.ChunkedArray:
    """Column `name` as float32, null where empty; `UserError` naming the row where it is no number."""
    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows, pa.float32())])
    if not (pa.types.is_string(table[name].type) or pa.types.is_large_string(table[name].type)):
        return table[name].cast(pa.float32())
    column = text(table, name)
    try:
        return column.cast(pa.float32())
    except pa.ArrowInvalid:
        for row, value in enumerate(column.to_pylist(), start=first_row):
            try:
                float(value or 0)
            except ValueError:
                raise UserError(
                    f"{path}, row {row}: {name} is {value!r}, which is no number; mend or empty it"
                ) from None
        raise


def product_table(columns: dict[str, Any], num_rows: int) -> pa.Table:
    """A `PRODUCT` table from some of its columns; the others are null, a null title is empty text."""
    arrays = []
    for field in PRODUCT:
        column = columns.get(field.name)
        if column is None:
            column = pa.nulls(num_rows, field.type)
        elif isinstance(column, list):
            column = pa.array(column, field.type)
        elif column.type != field.type:
            column = column.cast(field.type)
        arrays.append(pc.fill_null(column, "") if field.name == "title" else column)
    return pa.table(arrays, schema=PRODUCT)


def no_queries() -> Iterator[pa.Table]:
    """The log of a source that has none."""
    return iter(())


def query_log(path: str) -> Callable[[], Iterator[pa.Table]]:
    """A re-iterable stream of `QUERY` tables from a file with a column `query`, and `frequency` and `locale` if known, or
    from all files of a folder, one after the other; empty queries are left out, an unknown frequency (empty, or NaN) is
    1."""

    def stream() -> Iterator[pa.Table]:
        num_queries = 0
        for file in _files_of(path):
            for found in _queries_of(file):
                num_queries += found.num_rows
                yield found
        if not num_queries:
            raise UserError(f"{path} holds no query; give a log with queries, or leave data.queries out")

    return stream


def _files_of(given: str) -> list[Path]:
    path = localize(given)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] not in "._")
    if not files:
        raise UserError(f"{given} holds no file ending in {', '.join(SUFFIXES)}; give a log with queries")
    return files


def _queries_of(path: Path) -> Iterator[pa.Table]:
    first_row = 1
    for block in blocks(path, ["query"], ["frequency", "locale"]):
        frequency = number(block, "frequency", path, first_row)
        frequency = pc.fill_null(pc.if_else(pc.is_nan(frequency), None, frequency), 1.0)
        counts = pc.and_(pc.greater_equal(frequency, 0), pc.less(frequency, _MAX_FREQUENCY))
        if (wrong := pc.index(counts, False).as_py()) >= 0:
            raise UserError(
                f"{path}, row {first_row + wrong}: frequency is {frequency[wrong].as_py():g}; write how often it was typed"
            )
        first_row += block.num_rows
        columns = [text(block, "query"), frequency.cast(pa.int64(), safe=False), text(block, "locale")]
        keep = columns[0].is_valid()
        yield pa.table([column.filter(keep) for column in columns], schema=QUERY)


def _check_columns(path: Path, present: Sequence[str], required: Sequence[str]) -> None:
    for name in required:
        if name not in present:
            raise UserError(
                f"{path} lacks the column {name!r}; it has {', '.join(present) or 'none'}: rename or map one"
            )


def _parquet(path: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[pa.Table]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is no readable Parquet file ({_first_line(error)}); write it again") from error
    with file:
        present = file.schema_arrow.names
        _check_columns(path, present, required)
        wanted = [name for name in (*required, *optional) if name in present]
        row = 0
        batches = file.iter_batches(BLOCK_ROWS, columns=wanted)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"{path} breaks off after row {row} ({_first_line(error)}); write it again") from error
            if batch is None:
                return
            check_text(batch, path, row + 1)
            row += batch.num_rows
            yield pa.Table.from_batches([batch])


def _delimited(
    path: Path, required: Sequence[str], optional: Sequence[str], delimiter: str, encoding: str
) -> Iterator[pa.Table]:
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; it needs a header with {', '.join(required)}")
    parse = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    how = pacsv.ReadOptions(encoding=encoding, block_size=_CSV_BLOCK_BYTES)
    try:
        with pacsv.open_csv(path, pacsv.ReadOptions(encoding=encoding), parse) as peek:
            present = peek.schema.names
        _check_columns(path, present, required)
        wanted = [name for name in (*required, *optional) if name in present]
        convert = pacsv.ConvertOptions(
            include_columns=wanted,
            column_types=dict.fromkeys(present, pa.string()),
            strings_can_be_null=True,
            null_values=[""],
        )
        with pacsv.open_csv(path, how, parse, convert) as reader:
            for batch in reader:
                table = pa.Table.from_batches([batch])
                for start in range(0, table.num_rows, BLOCK_ROWS):
                    yield table.slice(start, BLOCK_ROWS)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        if (delimiter, encoding) == (DELIMITERS[path.suffix.lower()], "utf-8"):
            for _ in RowReader(path).batches(BLOCK_ROWS):  # slower, and it knows the row
                pass
        raise UserError(f"{path} cannot be read as {encoding} text with a header: {_first_line(error)}") from error


def _json_lines(path: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[pa.Table]:
    with path.open("rb") as stream:
        numbered = ((number, line) for number, line in enumerate(stream, start=1) if line.strip())
        while chunk := list(islice(numbered, BLOCK_ROWS)):
            rows = []
            for number, line in chunk:
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: no JSON ({error}); write one object a line") from error
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: not a JSON object; write one object a line")
                if _is_half_a_character(line, row):
                    raise UserError(
                        f"{path}, line {number}: an escape is half a character (\\ud800 and its like); mend it"
                    )
                for name in required:
                    if name not in row:
                        raise UserError(f"{path}, line {number} lacks the key {name!r}; rename or map one")
                rows.append(row)
            names = [*required, *(name for name in optional if any(name in row for row in rows))]
            yield pa.table({name: _json_column([row.get(name) for row in rows]) for name in names})


def _is_half_a_character(line: bytes, row: dict[str, Any]) -> bool:
    """Whether a line holds a lone surrogate, which JSON may spell and no text may hold."""
    if b"\\u" not in line:
        return False
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _json_column(values: list[Any]) -> pa.Array:
    """Lists of numbers stay lists; objects become JSON text; every scalar becomes text."""
    if any(isinstance(value, list) for value in values):
        return pa.array([value if isinstance(value, list) else None for value in values])
    return pa.array(
        [
            value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in values
        ],
        pa.string(),
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
