"""Labeling when things fail: a shard that cannot be labeled, an engine that dies, rows that failed, a job that hangs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_labeling import make_groups

from relevance_ray.engines.base import Labels, Pair
from relevance_ray.errors import UserError
from relevance_ray.labeling.attempts import MAX_ATTEMPTS, Attempts, shards_set_aside, take_back
from relevance_ray.labeling.labeler import ShardLabeler
from relevance_ray.labeling.pipeline import (
    MAX_FAILED_IN_ROW,
    EngineFailedError,
    Shard,
    label,
    shards_to_label,
)
from relevance_ray.storage import CommitLog
from relevance_ray.watchdog import StalledError, watchdog

pytestmark = pytest.mark.usefixtures("ray_sees_this_module")


@pytest.fixture
def ray_sees_this_module(ray_cluster: None) -> Iterator[None]:
    """Workers cannot import a test module; its classes travel by value."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class TroubledEngine:
    """Labels a pair with the length of its query, but for queries that `trouble` names: raise, exit, hang, or fail the
    row. A file `mended` in the folder ends all trouble. Every call leaves the pairs it was asked in a file, and closing
    the engine a line in another."""

    gains = (0.0, 1.0)
    num_tokens = 0

    def __init__(self, folder: Path, trouble: dict[str, str]) -> None:
        self.folder, self.trouble = folder, trouble

    def label(self, pairs: Sequence[Pair]) -> Labels:
        with (self.folder / "calls").open("a") as file:
            file.write(f"{pairs[0].query}: {len(pairs)}\n")
        trouble = {} if (self.folder / "mended").exists() else self.trouble
        kinds = {trouble.get(pair.query, "") for pair in pairs}
        if kinds & {"raise", "raise, and not close"}:
            raise RuntimeError("out of memory")
        if "exit" in kinds:
            os._exit(1)
        if "hang" in kinds:
            time.sleep(600)
        lengths = np.array([len(pair.query) for pair in pairs], dtype=np.float32)
        errors: list[str | None] = ["no label" if trouble.get(pair.query) == "row" else None for pair in pairs]
        lengths[[error is not None for error in errors]] = np.nan
        return Labels(np.stack([np.zeros_like(lengths), lengths], axis=1), errors, [None] * len(pairs))

    def close(self) -> None:
        with (self.folder / "closed").open("a") as file:
            file.write("closed\n")
        if "raise, and not close" in self.trouble.values():
            raise RuntimeError("its processes do not end")


def make_shards(folder: Path, count: int = 3) -> list[Shard]:
    groups = CommitLog(str(folder / "generate"))
    for start in range(0, 10 * count, 10):
        table = make_groups(start, start + 10)
        groups.commit(f"groups-{start:010d}-{start + 10:010d}", table, "g", {"pairs": 30})
    return shards_to_label(groups, list(groups.committed()))


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("trouble", ["raise", "raise, and not close", "exit"])
def test_a_shard_that_fails_thrice_is_set_aside_and_retried_on_request(tmp_path: Path, trouble: str) -> None:
    shards = make_shards(tmp_path)
    engine = partial(TroubledEngine, tmp_path, {"query 15": trouble})
    run = partial(label, shards, str(tmp_path / "label"), "t", engine)
    first = run()
    (name,) = first["set_aside"]
    assert name == shards[1].label_name
    assert ("process died" if trouble == "exit" else "out of memory") in first["set_aside"][name]
    assert (first["pairs"], first["errors"]) == (60, 0)
    assert calls(tmp_path).count("query 10: 30") == MAX_ATTEMPTS
    if trouble != "exit":
        assert (tmp_path / "closed").read_text().split() == ["closed"] * MAX_ATTEMPTS

    # Another run leaves it aside; a retry takes it on again.
    assert run()["set_aside"] == first["set_aside"]
    assert len(calls(tmp_path)) == MAX_ATTEMPTS + 2
    (tmp_path / "mended").touch()
    again = run(retry=True)
    assert (again["set_aside"], again["pairs"], again["skipped"]) == ({}, 90, 2)
    assert calls(tmp_path)[MAX_ATTEMPTS + 2 :] == ["query 10: 30"]
    assert shards_set_aside(str(tmp_path / "label")) == {}


def test_a_retry_labels_only_the_rows_that_failed(tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    out = str(tmp_path / "label")
    run = partial(label, shards, out, "t", partial(TroubledEngine, tmp_path, {"query 12": "row", "query 20": "row"}))
    assert run()["errors"] == 6
    untouched = CommitLog(out).committed()[shards[0].label_name]
    (tmp_path / "mended").touch()
    again = run(retry=True)
    assert (again["errors"], again["pairs"], again["skipped"]) == (0, 90, 1)
    assert sorted(calls(tmp_path)[3:]) == ["query 12: 3", "query 20: 3"]
    log = CommitLog(out)
    assert log.committed()[shards[0].label_name] == untouched
    products = [product for row in log.read(shards[1].label_name).to_pylist() for product in row["products"]]
    assert [product["logit"] for product in products] == [8.0] * 30
    assert not any(product["error"] for product in products)
    assert log.sweep() == 2  # the files that were replaced


@pytest.mark.parametrize("trouble", ["raise", "exit"])
def test_an_engine_that_fails_on_everything_ends_the_job_and_no_shard_is_blamed(tmp_path: Path, trouble: str) -> None:
    shards = make_shards(tmp_path, MAX_FAILED_IN_ROW + 3)
    engine = partial(TroubledEngine, tmp_path, {f"query {n}": trouble for n in range(100)})
    with pytest.raises(EngineFailedError, match=f"{MAX_FAILED_IN_ROW + 2} shards failed in a row"):
        label(shards, str(tmp_path / "label"), "t", engine)
    assert CommitLog(str(tmp_path / "label")).committed() == {}
    assert shards_set_aside(str(tmp_path / "label")) == {}


def test_a_few_bad_shards_in_a_row_do_not_end_the_job(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 4)
    result = label(
        shards,
        str(tmp_path / "label"),
        "t",
        partial(TroubledEngine, tmp_path, {f"query {n}": "raise" for n in (0, 10, 20)}),
    )
    assert list(result["set_aside"]) == [shard.label_name for shard in shards[:3]]
    assert result["pairs"] == 30


def test_what_the_user_must_mend_in_an_engine_reaches_the_driver_as_such(tmp_path: Path) -> None:
    def refuse() -> TroubledEngine:
        raise UserError("label.path names no file; give one")

    class Refusing(TroubledEngine):
        def label(self, pairs: Sequence[Pair]) -> Labels:
            return refuse().label(pairs)

    with pytest.raises(UserError, match="names no file"):
        label(make_shards(tmp_path), str(tmp_path / "label"), "t", partial(Refusing, tmp_path, {}))


def test_a_job_that_hangs_is_ended_and_goes_on_without_the_shard_that_hung(tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    run = partial(label, shards, str(tmp_path / "label"), "t", partial(TroubledEngine, tmp_path, {"query 5": "hang"}))
    with pytest.raises(UserError, match=r"no shard was labeled in .* the same command goes on"):
        run(no_progress_seconds=8)
    resumed = run(no_progress_seconds=8)
    assert resumed["pairs"] == 60
    assert list(resumed["set_aside"]) == [shards[0].label_name]
    assert "no progress" in resumed["set_aside"][shards[0].label_name]


def test_a_commit_whose_worker_died_before_it_could_say_so_counts(tmp_path: Path) -> None:
    """The last try committed, and its process died: the same shard, handed out again, is done."""
    shards = make_shards(tmp_path)
    out = str(tmp_path / "label")
    label(shards, out, "t", partial(TroubledEngine, tmp_path, {}))
    labeler = ShardLabeler(out, "t", partial(TroubledEngine, tmp_path, {}), "run")
    row = {"path": [shards[0].path], "label_name": [shards[0].label_name], "previous": [""]}
    assert labeler(row)["pairs"] == [30]
    assert len(calls(tmp_path)) == 3


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    request.getfixturevalue("s3_server")
    return f"s3://bucket/{tmp_path.name}"


def test_tries_are_counted_and_those_of_an_earlier_run_do_not_count(folder: str) -> None:
    for run in ("one", "two"):
        attempts = Attempts(folder, run)
        assert [attempts.begin("shard") for _ in range(MAX_ATTEMPTS + 1)] == [1, 2, 3, None]
    attempts.fail("shard", 2, "boom")
    attempts.set_aside("shard")
    assert shards_set_aside(folder) == {"shard": "boom"}
    attempts.begin("other")
    attempts.set_open_aside("hung")
    assert shards_set_aside(folder) == {"shard": "boom", "other": "hung"}
    take_back(folder, "shard")
    assert list(shards_set_aside(folder)) == ["other"]
    attempts.excuse()
    assert shards_set_aside(folder) == {}


def interrupted_in_a_library() -> None:
    try:
        time.sleep(30)
    except KeyboardInterrupt:
        raise ValueError("what the library makes of it") from None


def test_the_watchdog_sleeps_while_there_is_progress_and_passes_ctrl_c_on() -> None:
    with watchdog(1.0, "stalled") as beat:
        for _ in range(6):
            time.sleep(0.3)
            beat()
    with pytest.raises(KeyboardInterrupt), watchdog(60, "stalled"):
        raise KeyboardInterrupt
    with pytest.raises(StalledError, match="stalled"), watchdog(0.5, "stalled"):
        time.sleep(30)
    with pytest.raises(StalledError), watchdog(0.5, "stalled"):
        interrupted_in_a_library()
