"""Exactly once on an S3 that answers with errors, hangs, loses answers, and lets two race for one commit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pytest
import yaml
from flaky_s3 import Fault, FlakyS3, Plan, Request, seeded
from labeling_job import NUM_SHARDS, SlowEngine, shards_of
from labeling_runs import assert_labeled_once, finish, start

from relevance_ray import file_systems, storage, whole_files
from relevance_ray.errors import UserError
from relevance_ray.file_systems import StorageError
from relevance_ray.labeling.attempts import MAX_ATTEMPTS, shards_set_aside
from relevance_ray.labeling.labeler import ShardLabeler
from relevance_ray.lease import Lease
from relevance_ray.object_log import newest_lines
from relevance_ray.storage import CommitLog, join, listdir
from relevance_ray.whole_files import create_exclusive, streamed, write_bytes

READ_SECONDS = 2
PLAIN: dict[Fault, float] = {"500": 0.02, "503": 0.03, "hang": 0.005, "lost": 0.02, "broken": 0.02}
EXCLUSIVE: dict[Fault, float] = {"503": 0.05, "409": 0.1, "lost": 0.15, "vague": 0.05}


@pytest.fixture
def flaky(s3_server: None) -> Iterator[FlakyS3]:
    """A proxy without faults yet, before the server that this process itself asks."""
    server = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    assert server.hostname is not None
    assert server.port is not None
    with FlakyS3((server.hostname, server.port), hang_seconds=2 * READ_SECONDS) as proxy:
        yield proxy


@pytest.fixture
def through(flaky: FlakyS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyS3]:
    """The proxy, with this process before it, which is patient for a second only."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", flaky.url)
    monkeypatch.setattr(file_systems, "READ_SECONDS", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    yield flaky
    s3fs.S3FileSystem.clear_instance_cache()


def label_through(proxy: FlakyS3, root: str, **environment: str) -> subprocess.Popen[str]:
    """The labeling job, driver and actors, with the proxy for its S3."""
    patience = json.dumps({"config_kwargs": {"read_timeout": READ_SECONDS}})
    return start(root, 0.0, AWS_ENDPOINT_URL=proxy.url, FSSPEC_S3=patience, **environment)


def creates(proxy: FlakyS3, folder: str) -> Counter[str]:
    """How often the server let someone create each commit of a folder."""
    return Counter(
        request.path.split("?")[0].rsplit("/", 1)[-1].removesuffix(".json")
        for request in proxy.requests
        if request.exclusive and request.status == 200 and f"{folder.removeprefix('s3:/')}/commits/" in request.path
    )


def assert_committed_once(proxy: FlakyS3, folder: str) -> None:
    """Each shard's commit was created once, and names a file that is there."""
    records = CommitLog(folder).committed()
    assert creates(proxy, folder) == Counter(dict.fromkeys(records, 1))
    assert len(records) == NUM_SHARDS
    files = {record["file"] for record in records.values()}
    assert len(files) == NUM_SHARDS
    assert files <= set(listdir(join(folder, "data")))


def hurt(seed: int, factor: float) -> Plan:
    plain = seeded(seed, {fault: factor * rate for fault, rate in PLAIN.items()})
    exclusive = seeded(seed + 1, EXCLUSIVE)
    return lambda request: exclusive(request) if request.exclusive else plain(request)


def label_on_a_flaky_s3(proxy: FlakyS3, root: str, seed: int, factor: float, undisturbed: str) -> None:
    shards_of(root)
    proxy.plan = hurt(seed, factor)
    said = finish(label_through(proxy, root))
    assert f"'shards': {NUM_SHARDS}" in said
    assert "'set_aside': {}" in said
    assert {"503", "409", "lost"} <= set(proxy.faults())
    assert any(request.exclusive and request.fault == "lost" and request.status == 200 for request in proxy.requests)
    assert_committed_once(proxy, join(root, "label"))
    assert_labeled_once(root, undisturbed)


def test_an_s3_that_fails_hangs_and_loses_answers_gives_each_pair_one_label(flaky: FlakyS3, undisturbed: str) -> None:
    label_on_a_flaky_s3(flaky, "s3://bucket/flaky", 1, 0.3, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_an_s3_that_fails_one_request_in_four_gives_each_pair_one_label(
    flaky: FlakyS3, undisturbed: str, seed: int
) -> None:
    label_on_a_flaky_s3(flaky, f"s3://bucket/very-flaky-{seed}", seed, 2.5, undisturbed)


@pytest.mark.slow
def test_an_s3_that_goes_away_ends_the_job_in_one_sentence_and_what_follows_resumes(
    flaky: FlakyS3, undisturbed: str
) -> None:
    root = "s3://bucket/away"
    shards_of(root)
    flaky.plan = lambda _: "503" if len(creates(flaky, join(root, "label"))) >= 5 else ""
    process = label_through(flaky, root, AWS_MAX_ATTEMPTS="2")
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 1
    ours = [line for line in said.splitlines() if "(raylet)" not in line]  # Ray tells of the actors that it ended
    assert "failed in spite of retries" in ours[-1]
    kept = CommitLog(join(root, "label")).committed()
    assert 5 <= len(kept) < NUM_SHARDS

    flaky.plan = lambda _: ""
    said = finish(label_through(flaky, root))
    assert f"'skipped': {len(kept)}" in said
    assert_committed_once(flaky, join(root, "label"))
    assert_labeled_once(root, undisturbed)


@pytest.mark.slow
def test_the_command_says_in_one_sentence_that_its_s3_went_away_and_goes_on_when_it_is_back(
    flaky: FlakyS3, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    values = {
        "data": {"market_size": 300},
        "storage": {"root": "s3://bucket/away-command"},
        "generate": {"num_pairs": 800, "groups_per_shard": 5, "quotas": {"bm25": 4, "category": 2, "random": 2}},
        "label": {"engine": "oracle", "compact_mb": 0.02},
        "resources": {"cpus_per_label_actor": 1},
    }
    config.write_text(yaml.safe_dump(values))

    def command() -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": flaky.url,
            "AWS_MAX_ATTEMPTS": "2",
            "RELEVANCE_RAY_CACHE": str(tmp_path / "cache"),
        }
        run = [sys.executable, "-m", "relevance_ray.cli", "compact", str(config)]
        return subprocess.run(run, capture_output=True, text=True, env=environment, timeout=300, check=False)

    commits = re.compile(r"/label-\w+/commits/")

    def away(_: Request) -> Fault:
        return "503" if sum(request.exclusive and bool(commits.search(request.path)) for request in made) >= 5 else ""

    made = flaky.requests
    flaky.plan = away
    ended = command()
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    (error,) = (line for line in ended.stderr.splitlines() if line.startswith("error: "))
    assert "failed in spite of retries" in error

    flaky.plan = lambda _: ""
    storage.remove_file("s3://bucket/away-command/lease.json")  # nobody could give it back: as if it had run out
    again = command()
    assert again.returncode == 0, again.stderr
    assert "generate: done already, skipped" in again.stdout
    assert "shards were labeled before and were skipped" in again.stdout
    folder = storage.read_json("s3://bucket/away-command/latest.json")["compact"]
    assert sum(record["pairs"] for record in CommitLog(folder).committed().values()) == 800
    assert any(line.startswith("{") for line in newest_lines("s3://bucket/away-command").decode().splitlines())


def at_once(*functions: object) -> None:
    threads = [threading.Thread(target=function) for function in functions]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("fault", ["", "lost", "vague"])
def test_of_two_that_commit_a_shard_at_once_one_wins_and_knows_it(through: FlakyS3, fault: Fault) -> None:
    """With `lost`, the winner hears of its own second try only that somebody was first: itself."""
    log = f"s3://bucket/race-{fault}"
    meet = threading.Barrier(2)

    def plan(request: Request) -> Fault:
        if request.exclusive and request.number <= 2:
            meet.wait(30)
            return fault
        return ""

    through.plan = plan
    won: dict[int, bool] = {}

    def commit(number: int) -> None:
        won[number] = CommitLog(log).commit("s", pa.table({"x": [number]}), "f")

    at_once(lambda: commit(0), lambda: commit(1))
    assert sorted(won.values()) == [False, True]
    assert creates(through, log) == {"s": 1}
    (winner,) = (number for number in won if won[number])
    assert CommitLog(log).read("s").to_pydict() == {"x": [winner]}
    assert len(listdir(join(log, "data"))) == 2
    assert CommitLog(log).sweep() == 1
    assert CommitLog(log).read("s").to_pydict() == {"x": [winner]}


def labeler(folder: str, run: str, opened: list[str]) -> ShardLabeler:
    def open_engine() -> SlowEngine:
        opened.append(run)
        return SlowEngine(0.0)

    return ShardLabeler(folder, "t", open_engine, run)


def test_two_actors_that_label_one_shard_leave_one_commit_and_one_orphan(through: FlakyS3) -> None:
    root = "s3://bucket/two-actors"
    shard, folder = shards_of(root)[0], join(root, "label")
    meet, results = threading.Barrier(2), []

    def plan(request: Request) -> Fault:
        if request.exclusive and "/label/commits/" in request.path and request.number <= 2:
            meet.wait(30)
            return "lost"
        return ""

    through.plan = plan
    row = {"path": [shard.path], "label_name": [shard.label_name], "previous": [""]}
    at_once(*(lambda run=run: results.append(labeler(folder, run, [])(row)) for run in ("one", "two")))
    assert [result["labeled"] for result in results] == [[True], [True]]
    assert creates(through, folder) == {shard.label_name: 1}
    assert CommitLog(folder).sweep() == 1
    assert CommitLog(folder).read(shard.label_name).num_rows == 10


def test_a_shard_that_cannot_be_written_is_set_aside_and_its_engine_kept(
    through: FlakyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    root, opened = "s3://bucket/unwritable", []
    first, second = shards_of(root)[:2]
    folder = join(root, "label")
    through.plan = lambda request: "500" if f"/label/data/{first.label_name}" in request.path else ""
    actor = labeler(folder, "run", opened)
    results = [
        actor({"path": [shard.path], "label_name": [shard.label_name], "previous": [""]}) for shard in (first, second)
    ]
    assert [result["labeled"] for result in results] == [[False], [True]]
    assert [result["user_error"] for result in results] == [[""], [""]]
    assert opened == ["run"]
    assert through.faults() == {"500": MAX_ATTEMPTS}
    assert "failed in spite of retries (Please try again.)" in shards_set_aside(folder)[first.label_name]


def test_a_store_that_takes_no_marks_ends_the_job_for_the_user_to_see_to(
    through: FlakyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    root = "s3://bucket/no-marks"
    shard = shards_of(root)[0]
    through.plan = lambda request: "500" if request.method == "PUT" else ""
    row = {"path": [shard.path], "label_name": [shard.label_name], "previous": [""]}
    (message,) = labeler(join(root, "label"), "run", [])(row)["user_error"]
    assert "attempts/run" in message
    assert "failed in spite of retries" in message


def test_a_request_that_hangs_is_asked_again_soon(through: FlakyS3) -> None:
    through.plan = lambda request: "hang" if request.number == 1 else ""
    began = time.monotonic()
    write_bytes("s3://bucket/hung", b"content")
    assert storage.read_bytes("s3://bucket/hung") == b"content"
    assert through.faults()["hang"] == 3  # PUT, HEAD, GET
    assert time.monotonic() - began < 12


def test_how_often_is_tried_can_be_set_in_the_environment(through: FlakyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    def config() -> tuple[object, ...]:
        with file_systems.opened("s3://bucket/x") as (fs, _):
            config = fs.s3.meta.config
            return config.retries["mode"], config.retries["total_max_attempts"], config.read_timeout

    monkeypatch.setattr(file_systems, "READ_SECONDS", 10)  # a busy machine may take a second for an answer
    assert config() == ("standard", 6, 10)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setenv("AWS_RETRY_MODE", "adaptive")
    assert config() == ("adaptive", 2, 10)
    through.plan = lambda _: "500"
    with pytest.raises(StorageError, match="s3://bucket/x failed in spite of retries"):
        storage.exists("s3://bucket/x")
    assert through.faults() == {"500": 2}


def test_a_conflict_is_asked_again_and_one_that_stays_is_told(
    through: FlakyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_files, "_CONFLICT_SECONDS", (0.0, 0.0))
    through.plan = lambda request: "409" if request.number <= 2 else ""
    assert create_exclusive("s3://bucket/conflict", b"mine")
    through.plan = lambda _: "409"
    with pytest.raises(StorageError, match="conflict failed"):
        create_exclusive("s3://bucket/conflict", b"other")


def test_a_stream_whose_last_answer_is_lost_is_there_and_one_that_breaks_off_is_not(
    through: FlakyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_files, "PART_BYTES", 5 * 2**20)
    through.plan = lambda request: "lost" if "uploadId=" in request.path and request.number == 1 else ""
    blocks = [bytes([number]) * 2**20 for number in range(12)]
    with streamed("s3://bucket/streamed") as file:
        file.writelines(blocks)
    assert through.faults()["lost"] >= 3  # its parts and their completion
    assert storage.read_bytes("s3://bucket/streamed") == b"".join(blocks)

    def break_off() -> None:
        with streamed("s3://bucket/broken-off") as file:
            file.writelines(blocks)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert not storage.exists("s3://bucket/broken-off")


def test_what_ended_a_run_is_told_also_where_the_lease_cannot_be_given_back(
    through: FlakyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")

    def end(root: str, error: Exception | None) -> None:
        through.plan = lambda _: ""
        with Lease(root):
            through.plan = lambda _: "500"
            if error is not None:
                raise error

    with pytest.raises(UserError, match="the first failure"):
        end("s3://bucket/leased", UserError("the first failure"))
    with pytest.raises(StorageError, match="lease.json failed"):
        end("s3://bucket/leased-too", None)
