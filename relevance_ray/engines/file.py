"""Labels that exist already: a file of grades or logits takes the teacher's place.

So a shop that has its own teacher, or paid for labels, enters the chain here. What stays in memory are two arrays
sorted by the pair's hash, 16 bytes a row and no text, so that tens of millions of labels fit beside whatever else runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from scipy.stats import norm

from relevance_ray.calibration import class_logits_of_distribution
from relevance_ray.engines.base import SINGLE_LOGIT_GAINS, Labels, Pair, row_error
from relevance_ray.errors import UserError
from relevance_ray.schema import LabelScale, pair_id


class FileEngine:
    """Looks pairs up by (query, product_id), the query in its normal form.

    Args:
        path: a Parquet, CSV (.csv, .tsv) or JSON-lines (.jsonl, .json) file with the columns `query`, `product_id` and
            `logit` or `grade` (a name on the scale, or a number between its grades). With both, `logit` is read.
        scale: what the grades mean. A grade becomes the log of its distribution, smoothed to its neighbours.
        label_smoothing: the mass that goes there.
        by_rank: replace logits by normal scores of their rank among the file's distinct ones, so that any numbers (a -1e9
            for what a filter removed, too) keep their order in float32.

    Raises:
        UserError: no such file, not of its kind, a missing column, an unknown grade or an empty cell (with its row),
            two different labels of one pair.
    """

    num_tokens = 0

    def __init__(
        self, path: str | Path, scale: LabelScale, label_smoothing: float = 0.1, by_rank: bool = False
    ) -> None:
        self.path, self.label_smoothing, self._by_rank = Path(path), label_smoothing, by_rank
        table = _read(self.path)
        columns = set(table.column_names)
        has_logit = "logit" in columns
        missing = [name for name in ("query", "product_id") if name not in columns]
        if not has_logit and "grade" not in columns:
            missing.append("grade or logit")
        if missing:
            raise UserError(f"{path} lacks the column {' and '.join(missing)}; it has {', '.join(table.column_names)}")
        if table.num_rows == 0:
            raise UserError(f"{path} holds no labels; give a file with rows of query, product_id and grade or logit")
        self.gains = SINGLE_LOGIT_GAINS if has_logit else scale.gains
        labels, self._values = self._logits(table) if has_logit else self._grades(table, scale)

        queries, products = self._texts(table, "query"), self._texts(table, "product_id")
        keys = np.fromiter(map(pair_id, queries, products), dtype=np.int64, count=table.num_rows)
        order = np.argsort(keys, kind="stable")
        self._keys, self._labels = keys[order], labels[order]
        clashes = np.flatnonzero((np.diff(self._keys) == 0) & (np.diff(self._labels) != 0))
        if len(clashes):
            first, second = sorted(order[clashes[0] : clashes[0] + 2])
            raise UserError(
                f"{path} rows {first + 1} and {second + 1} label the pair ({queries[first]!r}, {products[first]!r}) "
                "differently; keep one"
            )

    def label(self, pairs: Sequence[Pair]) -> Labels:
        """Labels of pairs; one that the file does not hold is an error of its row."""
        problems = [row_error(pair.query, {}) for pair in pairs]
        keys = np.zeros(len(pairs), dtype=np.int64)
        for row, pair in enumerate(pairs):
            if problems[row] is None:
                keys[row] = pair_id(pair.query, pair.product_id)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        found = (self._keys[place] == keys) & np.asarray([problem is None for problem in problems], dtype=bool)
        class_logits = np.full((len(pairs), len(self.gains)), np.nan, dtype=np.float32)
        class_logits[found] = self._values[self._labels[place[found]]]
        missing = f"{self.path.name} holds no label of this query and product"
        errors = [None if hit else problem or missing for hit, problem in zip(found, problems, strict=True)]
        return Labels(class_logits, errors, [None] * len(pairs))

    def _logits(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Index into distinct values [n], and the class logits [v, 2] of each."""
        kind = table.schema.field("logit").type
        if pa.types.is_boolean(kind) or pa.types.is_temporal(kind):
            raise UserError(f"{self.path} column logit holds {kind} values, no numbers; write the scores there")
        try:
            logits = pc.cast(table["logit"], pa.float64()).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(
                f"{self.path} {_first_that_is_no_number(table['logit'])}; mend or remove the row"
            ) from error
        bad = np.flatnonzero(~np.isfinite(logits))
        if len(bad):
            raise UserError(
                f"{self.path} row {bad[0] + 1}: logit {logits[bad[0]]} is not a finite number; remove the row"
            )
        values, index = np.unique(logits, return_inverse=True)
        if self._by_rank:
            values = norm.ppf((np.arange(len(values)) + 0.5) / len(values))
        return index, np.stack([np.zeros_like(values), values], axis=1).astype(np.float32)

    def _grades(self, table: pa.Table, scale: LabelScale) -> tuple[np.ndarray, np.ndarray]:
        grades = self._texts(table, "grade")
        values, first_row, index = np.unique(np.asarray(grades), return_index=True, return_inverse=True)
        distributions = []
        for grade, row in zip(values.tolist(), first_row, strict=True):
            try:
                distributions.append(scale.distribution(grade, label_smoothing=self.label_smoothing))
            except UserError as error:
                raise UserError(f"{self.path} row {row + 1}: {error}; mend the grade or set data.scale") from error
        return index, class_logits_of_distribution(np.stack(distributions))

    def _texts(self, table: pa.Table, column: str) -> list[str]:
        texts = pc.cast(table[column], pa.string())
        empty = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(texts, ""))), 0).to_numpy()
        if empty.any():
            raise UserError(
                f"{self.path} row {np.flatnonzero(empty)[0] + 1}: {column} is empty; fill it or remove the row"
            )
        return texts.to_pylist()


def _first_that_is_no_number(values: pa.ChunkedArray) -> str:
    for row, value in enumerate(values.to_pylist(), 1):
        try:
            float(value)
        except (TypeError, ValueError):
            return f"row {row}: logit {value!r} is no number"
    return f"column logit holds {values.type} values, which are no numbers"


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        raise UserError(f"file of labels {path} does not exist; give a Parquet, CSV or JSON-lines file")
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            # Ids stay text: "007" must not become 7.
            convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(("query", "product_id", "grade"), pa.string()))
            delimiter = "\t" if suffix == ".tsv" else ","
            return pa.csv.read_csv(
                path,
                parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=convert,
            )
        if suffix in (".jsonl", ".json", ".ndjson"):
            return pa.json.read_json(path)
        if suffix in (".parquet", ".pq"):
            return pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} cannot be read as {suffix[1:]} ({' '.join(str(error).split())[:200]})") from error
    raise UserError(f"{path} ends in {suffix or 'no suffix'}; give a .parquet, .csv, .tsv or .jsonl file")
