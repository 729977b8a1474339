"""Compaction: the same labels in few files, growth at the tail alone, and nothing twice or lost when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_labeling import LengthEngine, make_groups

from relevance_ray import whole_files
from relevance_ray.chain.run_state import describe
from relevance_ray.config import build_config
from relevance_ray.errors import UserError
from relevance_ray.labeling import compaction
from relevance_ray.labeling.compact_pipeline import in_ray_tasks
from relevance_ray.labeling.compaction import compact, compacted_files, count_file, plan_parts
from relevance_ray.labeling.shard import count_errors, label_groups
from relevance_ray.schema import LABELED_GROUP
from relevance_ray.steps import Chain
from relevance_ray.storage import CommitLog, file_sizes, join, listdir, read_bytes, read_table, write_bytes

TARGET = 60_000


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    request.getfixturevalue("s3_server")
    return f"s3://bucket/{tmp_path.name}"


def make_labels(root: str, tmp_path: Path, start: int, stop: int, groups: int = 10) -> CommitLog:
    """Label shards `start` to `stop`, of sizes that differ."""
    log = CommitLog(join(root, "label"))
    for shard in range(start, stop):
        first = shard * groups
        table = make_groups(first, first + groups, products=3 + shard % 5 * 4)
        labeled = label_groups(table, lambda: LengthEngine(tmp_path / "calls"))
        pairs = len(labeled["products"].combine_chunks().flatten())
        counts = {"pairs": pairs, "errors": count_errors(labeled)}
        log.commit(f"groups-{first:010d}-{first + groups:010d}-abcdef", labeled, "t", counts)
    return log


def run(root: str, labels: CommitLog, shards: list[str] | None = None, target_bytes: int = TARGET) -> dict[str, object]:
    shards = list(labels.committed()) if shards is None else shards
    return compact(labels, shards, join(root, "compact"), "c", target_bytes=target_bytes)


def rows_of(root: str, labels: CommitLog, shards: list[str] | None = None) -> pa.Table:
    shards = list(labels.committed()) if shards is None else shards
    files = compacted_files(join(root, "compact"), labels, shards)
    return pa.concat_tables([read_table(file) for file in files])


def assert_same_labels(root: str, labels: CommitLog) -> None:
    """Row by row what the shards hold, in their order; and what the summary and the commits say of it is so."""
    expected = pa.concat_tables([labels.read(shard) for shard in labels.committed()])
    assert rows_of(root, labels).equals(expected)
    records = CommitLog(join(root, "compact")).committed().values()
    ids = expected["products"].combine_chunks().flatten().field("pair_id").to_numpy().view(np.uint64)
    assert sum(record["rows"] for record in records) == expected.num_rows
    assert sum(record["pairs"] for record in records) == len(ids)
    assert sum(int(record["pair_ids"], 16) for record in records) % 2**64 == int(ids.sum(dtype=np.uint64))


def test_the_files_hold_the_shards_row_by_row_and_are_near_the_target(root: str, tmp_path: Path) -> None:
    labels = make_labels(root, tmp_path, 0, 40)
    summary = run(root, labels)
    assert_same_labels(root, labels)
    shard_sizes = file_sizes(join(labels.folder, "data"))
    records = labels.committed()
    parts = plan_parts(labels, list(records), TARGET)
    assert summary["files"] == len(parts) > 3
    for part in parts[:-1]:
        packed = sum(shard_sizes[records[shard]["file"]] for shard in part.shards)
        assert abs(packed - TARGET) <= max(shard_sizes.values())
    assert run(root, labels)["kept"] == summary["files"]
    for path in CommitLog(join(root, "compact")).files():
        written = pq.read_schema(pa.BufferReader(read_bytes(path)))
        assert written.equals(LABELED_GROUP)


def test_a_shard_larger_than_the_target_is_a_file_and_row_groups_stay_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    labels = make_labels(root, tmp_path, 0, 4, groups=200)
    monkeypatch.setattr(compaction, "ROW_GROUP_BYTES", 100_000)
    assert run(root, labels, target_bytes=1)["files"] == 4
    assert_same_labels(root, labels)
    large = pq.ParquetFile(CommitLog(join(root, "compact")).files()[3])
    assert large.num_row_groups > 1
    assert max(large.metadata.row_group(n).num_rows for n in range(large.num_row_groups)) < 200


def test_labels_that_grew_rewrite_the_last_file_only(root: str, tmp_path: Path) -> None:
    labels = make_labels(root, tmp_path, 0, 33)
    first = run(root, labels)
    before = CommitLog(join(root, "compact")).committed()
    grown = make_labels(root, tmp_path, 33, 45)
    second = run(root, grown)
    assert_same_labels(root, grown)
    after = CommitLog(join(root, "compact")).committed()
    *full, last = sorted(before)
    assert {name: before[name] for name in full}.items() <= after.items()
    assert last not in after
    assert second["kept"] == first["files"] - 1  # type: ignore[operator]
    # The data of what was superseded is there for those who read it, until the next time.
    assert before[last]["file"] in listdir(join(root, "compact", "data"))
    run(root, grown)
    assert before[last]["file"] not in listdir(join(root, "compact", "data"))
    assert_same_labels(root, grown)


def test_between_two_commits_a_reader_sees_each_pair_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(tmp_path)
    labels = make_labels(root, tmp_path, 0, 33)
    old = list(labels.committed())
    run(root, labels)
    grown = make_labels(root, tmp_path, 33, 45)
    monkeypatch.setattr(CommitLog, "drop", lambda *_: None)  # as if killed before the superseded commit was dropped
    run(root, grown)
    files = CommitLog(join(root, "compact")).files()
    assert sum(count_file(file).rows for file in files) > 450
    assert rows_of(root, grown).num_rows == 450
    assert rows_of(root, grown, old).num_rows == 330
    monkeypatch.undo()
    run(root, grown)
    assert_same_labels(root, grown)
    with pytest.raises(UserError, match="does not hold these labels; run relevance-ray compact"):
        rows_of(root, grown, old)


def test_a_shard_that_was_labeled_again_is_compacted_again(tmp_path: Path) -> None:
    root = str(tmp_path)
    labels = make_labels(root, tmp_path, 0, 40)
    run(root, labels)
    shard, record = list(labels.committed().items())[20]
    again = labels.read(shard).set_column(2, LABELED_GROUP.field("query_source"), pa.array(["again"] * 10))
    counts = {"pairs": record["pairs"], "errors": 0}
    assert labels.replace(shard, again, "t2", counts, instead_of=record["file"])
    labels = CommitLog(labels.folder)
    with pytest.raises(UserError, match="run relevance-ray compact"):
        rows_of(root, labels)
    assert run(root, labels)["kept"]
    assert_same_labels(root, labels)


def test_a_label_file_that_is_not_what_its_commit_says_is_refused(tmp_path: Path) -> None:
    root = str(tmp_path)
    labels = make_labels(root, tmp_path, 0, 3)
    path = labels.files()[1]
    write_bytes(path, read_bytes(labels.files()[0]))
    with pytest.raises(UserError, match="does not hold what its commit says"):
        run(root, labels)
    assert CommitLog(join(root, "compact")).committed() == {}
    with pytest.raises(UserError, match="label first"):
        run(root, labels, shards=[])


@pytest.mark.usefixtures("ray_cluster")
def test_files_are_written_in_ray_tasks_and_a_refusal_is_told_as_it_is(tmp_path: Path) -> None:
    root = str(tmp_path)
    labels = make_labels(root, tmp_path, 0, 20)
    shards = list(labels.committed())
    compact(labels, shards, join(root, "compact"), "c", target_bytes=TARGET, run=in_ray_tasks)
    assert_same_labels(root, labels)
    write_bytes(labels.files()[-1], b"broken")
    with pytest.raises(UserError, match="does not hold what its commit says") as caught:
        compact(labels, shards, join(root, "other"), "c", target_bytes=TARGET, run=in_ray_tasks)
    assert "\n" not in str(caught.value)


def test_a_file_of_many_parts_goes_to_s3_as_it_is_made(
    s3_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_files, "PART_BYTES", 5 * 2**20)
    root = "s3://bucket/large"
    log, rng = CommitLog(join(root, "label")), np.random.default_rng(0)
    for shard in range(3):
        table = label_groups(make_groups(shard, shard + 1, products=2), lambda: LengthEngine(tmp_path / "calls"))
        noise = pa.array([rng.bytes(3_000_000).hex()])  # what zstd cannot make small: 3 MB a shard
        table = table.set_column(1, LABELED_GROUP.field("query"), noise)
        log.commit(f"groups-{shard}", table, "t", {"pairs": 2, "errors": 0})
    assert run(root, log, target_bytes=2**30)["files"] == 1
    assert_same_labels(root, log)
    (size,) = file_sizes(join(root, "compact", "data")).values()
    assert size > 8 * 2**20


@pytest.mark.parametrize("kind", ["disk", pytest.param("s3", marks=pytest.mark.slow)])
def test_kill_9_in_the_middle_then_resume_gives_the_same(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if kind == "s3":
        request.getfixturevalue("s3_server")
    root = str(tmp_path / "root") if kind == "disk" else "s3://bucket/killed-compaction"
    labels = make_labels(root, tmp_path, 0, 60)
    log = CommitLog(join(root, "compact"))

    def start(seconds: float) -> subprocess.Popen[str]:
        script = str(Path(__file__).with_name("compaction_job.py"))
        command = [sys.executable, script, root, "10000", str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    done: list[str] = []
    for wait in (0.0, 0.03):
        process = start(0.05)
        deadline = time.monotonic() + 60
        while len(log.committed()) < len(done) + 3:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        done = sorted(log.committed())
    write_bytes(join(root, "compact", "data", "half-a-file.parquet"), b"PAR1")
    files = {name: record["file"] for name, record in log.committed().items()}
    process = start(0.0)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert f"'kept': {len(done)}" in said
    assert len(done) < len(plan_parts(labels, list(labels.committed()), 10_000))
    assert {name: record["file"] for name, record in log.committed().items()}.items() >= files.items()
    assert_same_labels(root, labels)
    assert sorted(listdir(join(root, "compact", "data"))) == sorted(
        record["file"] for record in log.committed().values()
    )


@pytest.mark.usefixtures("ray_cluster")
def test_compact_runs_what_it_needs_follows_growth_and_is_no_part_of_the_chain(tmp_path: Path) -> None:
    def chain(num_pairs: int) -> Chain:
        generate = {
            "num_pairs": num_pairs,
            "groups_per_shard": 25,
            "quotas": {"bm25": 4, "category": 2, "random": 2},
        }
        values = {
            "data": {"market_size": 300},
            "storage": {"root": str(tmp_path / "root")},
            "generate": generate,
            "label": {"engine": "oracle", "compact_mb": 0.02},
            "resources": {"cpus_per_label_actor": 1},
        }
        return Chain(build_config(values), said.append)

    said: list[str] = []
    assert "compact" not in chain(800).at.until(None)
    assert chain(800).at.until("compact") == ("prepare", "generate", "label", "compact")
    first = chain(800).run("compact")
    labels = first.summaries["label"]
    assert (first.summaries["compact"]["pairs"], first.summaries["compact"]["shards"]) == (labels["pairs"], 4)
    assert first.summaries["compact"]["files"] > 1
    said.clear()
    chain(800).run("compact")
    assert len([line for line in said if "done already, skipped" in line]) == 4
    grown = chain(1000).run("compact")
    assert grown.folders["compact"] == first.folders["compact"]
    assert grown.summaries["compact"]["pairs"] == grown.summaries["label"]["pairs"] == 1000
    assert grown.summaries["compact"]["kept"] >= 1
    (line,) = (line for line in describe(str(tmp_path / "root")) if line.startswith("compact"))
    assert "done in" in line
    assert f"{grown.summaries['compact']['files']} files, 1,000 pairs" in line
    at = chain(1000).at
    files = compacted_files(at.folder("compact"), CommitLog(at.folder("label")), at.labeled_shards())
    assert sum(count_file(file).pairs for file in files) == 1000
