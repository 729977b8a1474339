"""A shop without judgments: what can be done is done, and what cannot is refused before anything is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relevance_ray.config import build_config
from relevance_ray.data.prepare import prepare, read_judged, read_queries
from relevance_ray.data.source import DataOptions
from relevance_ray.errors import UserError
from relevance_ray.schema import JUDGED_GROUP
from relevance_ray.steps import Chain


def write_shop(folder: Path) -> DataOptions:
    folder.mkdir()
    (folder / "products.csv").write_text("product_id,title\n1,red lamp\n2,blue lamp\n")
    (folder / "log.csv").write_text("query,frequency\nlamp,3\nred lamp,1\n")
    return DataOptions(
        format="generic", path=str(folder), judgments="none", queries=str(folder / "log.csv"), scale="binary"
    )


def test_a_catalog_and_a_log_are_prepared_without_judgments(tmp_path: Path) -> None:
    summary = prepare(write_shop(tmp_path / "shop"), tmp_path / "prepared")
    assert (summary["products"], summary["judgments"], summary["log_queries"]) == (2, 0, 2)
    assert summary["queries_by_split"] == {"train": 0, "dev": 0, "test": 0}
    judged = read_judged(tmp_path / "prepared")
    assert judged.schema.names == JUDGED_GROUP.names
    assert judged.num_rows == 0
    assert read_queries(tmp_path / "prepared")["query"].to_pylist() == ["lamp", "red lamp"]


@pytest.mark.parametrize("until", [None, "train-teacher", "label", "train-student", "evaluate"])
def test_steps_that_learn_from_judgments_are_refused_before_anything_is_made(tmp_path: Path, until: str | None) -> None:
    options = write_shop(tmp_path / "shop")
    values: dict[str, Any] = {
        "data": {name: getattr(options, name) for name in ("format", "path", "judgments", "queries", "scale")},
        "storage": {"root": str(tmp_path / "root")},
    }
    with pytest.raises(UserError, match=r"data\.judgments is none, and train-teacher learns from judgments"):
        Chain(build_config(values)).run(until)
    assert not (tmp_path / "root").exists()


def test_a_missing_file_of_judgments_says_what_to_write_instead(tmp_path: Path) -> None:
    options = write_shop(tmp_path / "shop")
    with pytest.raises(UserError, match=r"name it in data\.judgments, or write none"):
        prepare(DataOptions(format="generic", path=options.path, scale="binary"), tmp_path / "prepared")
