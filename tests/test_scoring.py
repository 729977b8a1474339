"""The `score` command's core on real files and a real, tiny model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_student import build_tiny_student

from relevance_ray.errors import UserError
from relevance_ray.scoring import score_file
from relevance_ray.serving.scorer import Scorer
from relevance_ray.templates import Template

ROWS = [
    {"sku": "007", "query": "red shoes", "title": "nike running shoes", "color": "red", "brand": "nike"},
    {"sku": "008", "query": "red shoes", "title": "leather wallet, with\na case", "color": None, "brand": None},
    {"sku": "9.0", "query": "phone case", "title": "phone case for phone", "color": "blue", "brand": "acme"},
    {"sku": "010", "query": "red shoes", "title": "blue shoes", "color": "blue", "brand": "nike"},
    {"sku": "011", "query": "cotton shirt", "title": "green shirt", "color": "green", "brand": "acme"},
]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_student(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture(scope="module")
def expected(student: Path) -> list[dict]:
    scorer = Scorer(student)
    return [scorer.score(row["query"], [row])[0] for row in ROWS]


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def read_rows(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))


@pytest.mark.parametrize("output", ["out.parquet", "out.csv", "out.tsv", "out.jsonl"])
@pytest.mark.parametrize("source", ["in.parquet", "in.csv", "in.tsv", "in.jsonl"])
def test_rows_come_back_in_order_with_the_scores_of_the_scorer(
    student: Path, expected: list[dict], tmp_path: Path, source: str, output: str
) -> None:
    summary = score_file(student, write_rows(tmp_path / source, ROWS), tmp_path / "new" / output, batch_rows=2)
    assert (summary.rows, summary.failed, summary.first_failure) == (5, 0, None)
    written = read_rows(tmp_path / "new" / output)
    assert list(written[0]) == [*ROWS[0], "logit", "probability", "score"]
    for row, given, scores in zip(written, ROWS, expected, strict=True):
        assert {name: row[name] or None for name in given} == given
        for name in ("logit", "probability", "score"):
            assert float(row[name]) == pytest.approx(scores[name], abs=1e-5)
    assert np.std([float(row["logit"]) for row in written]) > 0.05


def test_parquet_columns_keep_their_types_and_score_columns_are_float32(student: Path, tmp_path: Path) -> None:
    table = pa.table(
        {
            "query": pa.array(["red shoes"] * 2).dictionary_encode(),
            "title": pa.array(["nike shoes", "wallet"], pa.large_string()),
            "attributes": pa.array([[("size", "9")], None], pa.map_(pa.string(), pa.string())),
            "seen": pa.array([1, 2], pa.timestamp("ns")),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    score_file(student, tmp_path / "in.parquet", tmp_path / "out.parquet")
    written = pq.read_table(tmp_path / "out.parquet")
    before = pq.read_table(tmp_path / "in.parquet")
    assert written.select(before.column_names).equals(before)
    assert [str(written.schema.field(name).type) for name in ("logit", "probability", "score")] == ["float"] * 3


def test_attributes_and_price_are_read_from_text_as_from_typed_columns(tmp_path: Path) -> None:
    folder = build_tiny_student(tmp_path / "student", Template(fields=("title", "attributes", "price"), max_tokens=48))
    typed = {"query": "red shoes", "title": "shoes", "attributes": {"color": "red", "a": "nike"}, "price": 9.0}
    text = typed | {"attributes": json.dumps(typed["attributes"]), "price": "9"}
    score_file(folder, write_rows(tmp_path / "typed.jsonl", [typed]), tmp_path / "typed.out.jsonl")
    score_file(folder, write_rows(tmp_path / "text.csv", [text]), tmp_path / "text.out.csv")
    logits = [float(read_rows(tmp_path / name)[0]["logit"]) for name in ("typed.out.jsonl", "text.out.csv")]
    assert logits[0] == pytest.approx(logits[1], abs=1e-6)


def test_query_longer_than_the_model_reads_leaves_only_its_row_without_numbers(student: Path, tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[1] | {"query": "red " * 40}, ROWS[2]]
    seen = []
    summary = score_file(
        student,
        write_rows(tmp_path / "in.csv", rows),
        tmp_path / "out.jsonl",
        on_progress=lambda done, failed: seen.append((done, failed)),
    )
    assert (summary.rows, summary.failed) == (3, 1)
    assert "in.csv, row 2: the query has" in str(summary.first_failure)
    assert [row["logit"] is None for row in read_rows(tmp_path / "out.jsonl")] == [False, True, False]
    assert seen == [(3, 1)]


def test_lone_surrogate_in_an_unread_json_column_survives_the_round_trip(student: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"query": "red", "title": "shoe", "note": "\\ud800"}\n')
    score_file(student, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert read_rows(tmp_path / "out.jsonl")[0]["note"] == "\ud800"


BAD_FILES = [
    ("in.csv", b"q,title\nred,shoe\n", "has no column `query`"),
    ("in.csv", b"query,name\nred,shoe\n", "none of the columns this model reads (title, brand, color)"),
    ("in.csv", b"query,title\nred,shoe\n  ,shoe\n", "row 2: the query is empty"),
    ("in.csv", b"query,title\nred,shoe\nred,\n", "row 2: the product has no text"),
    ("in.csv", b"query,title\nred,shoe,wallet\n", "row 1: 3 cells but 2 columns"),
    ("in.csv", b'query,title\nred,"shoe\n', "quote the cell"),
    ("in.csv", b"query,title\nred,caf\xe9\n", "is not UTF-8"),
    ("in.csv", b"query,title,title\nred,shoe,shoe\n", "has the column 'title' twice"),
    ("in.csv", b"query,title\n", "has no rows"),
    ("in.csv", b"", "has no column `query`"),
    ("in.csv", b"query,title,score\nred,shoe,1\n", "has a column `score` already"),
    ("in.jsonl", b'{"query": "red", "title": "shoe"}\n{"query": "red"\n', "line 2: no JSON"),
    ("in.jsonl", b'["red"]\n', "line 1: not a JSON object"),
    ("in.jsonl", b'{"query": "red", "title": "shoe"}\n{"title": "shoe"}\n', "row 2: it has no `query`"),
    ("in.jsonl", b'{"query": 5, "title": "shoe"}\n', "row 1: the query is a int, not text"),
    ("in.jsonl", b'{"query": "red", "title": "\\ud800"}\n', "row 1: the product's title holds a lone surrogate"),
    ("in.parquet", b"PAR1 not really", "is no readable Parquet file"),
    ("in.xlsx", b"", "its ending says nothing about its format"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[message[:40] for *_, message in BAD_FILES])
def test_bad_input_is_named_and_nothing_is_written(
    student: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        score_file(student, tmp_path / name, tmp_path / "out" / "out.csv", batch_rows=1)
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_parquet_cut_short_is_refused(student: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.parquet", ROWS)
    whole = bytearray(path.read_bytes())
    whole[4:200] = b"\xff" * 196
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"in\.parquet breaks off after row 0"):
        score_file(student, path, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_missing_input_and_input_as_output_are_refused(student: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.csv is no file"):
        score_file(student, tmp_path / "absent.csv", tmp_path / "out.csv")
    path = write_rows(tmp_path / "in.csv", ROWS)
    with pytest.raises(UserError, match="is the input itself"):
        score_file(student, path, path)
    with pytest.raises(UserError, match="is no model folder"):
        score_file(tmp_path, path, tmp_path / "out.csv")


def test_model_without_calibration_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_student(tmp_path / "student", calibrated=False)
    with pytest.raises(UserError, match="has no calibration"):
        score_file(folder, write_rows(tmp_path / "in.csv", ROWS), tmp_path / "out.csv")


def test_failure_while_writing_leaves_the_old_output_and_no_staging_file(student: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.csv", ROWS)
    (tmp_path / "out.csv").write_text("old")

    def stop(done: int, failed: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_file(student, path, tmp_path / "out.csv", on_progress=stop)
    assert (tmp_path / "out.csv").read_text() == "old"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in.csv", "out.csv"]
