"""Commits, fingerprints and the lease, on local disk and on S3."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from relevance_ray import storage
from relevance_ray.errors import UserError, what_to_mend
from relevance_ray.file_systems import why
from relevance_ray.lease import Lease, lease_holder
from relevance_ray.storage import CommitLog, content_id, fingerprint, join


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    request.getfixturevalue("s3_server")
    return f"s3://bucket/{tmp_path.name}"


TABLE = pa.table({"x": [1, 2, 3]})


def test_a_whole_file_is_created_by_one_only(root: str) -> None:
    path = join(root, "a", "file.json")
    assert storage.create_exclusive(path, b"first")
    assert not storage.create_exclusive(path, b"second")
    assert storage.read_bytes(path) == b"first"
    assert storage.listdir(join(root, "a")) == ["file.json"]


def test_a_full_disk_names_the_file_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    path = join(str(tmp_path), "file.json")
    for write in (storage.create_exclusive, storage.write_bytes):
        with pytest.raises(OSError, match="No space left") as raised:
            write(path, b"content")
        assert what_to_mend(raised.value) == f"{path}: No space left on device; make room, and the same command goes on"
        assert list(tmp_path.iterdir()) == []


def test_the_second_attempt_at_a_shard_loses_and_its_orphan_is_swept(root: str) -> None:
    log = CommitLog(join(root, "label-1"))
    assert log.commit("shard-0", TABLE, "f", {"pairs": 3})
    assert not CommitLog(log.folder).commit("shard-0", TABLE.slice(0, 1), "f")
    assert log.read("shard-0").num_rows == 3
    assert len(storage.listdir(join(log.folder, "data"))) == 2
    assert log.sweep() == 1
    assert [join(log.folder, "data", name) for name in storage.listdir(join(log.folder, "data"))] == log.files()


def test_a_data_file_without_a_commit_is_no_shard(root: str) -> None:
    log = CommitLog(join(root, "label-2"))
    storage.write_table(join(log.folder, "data", "shard-9-abc.parquet"), TABLE)
    assert log.committed() == {}
    log.commit("shard-0", TABLE, "f")
    record = CommitLog(log.folder).committed()["shard-0"]
    assert (record["rows"], record["fingerprint"], record["file"][:8]) == (3, "f", "shard-0-")


def test_a_dropped_shard_can_be_committed_again(root: str) -> None:
    log = CommitLog(join(root, "label-3"))
    log.commit("s", TABLE, "f")
    log.drop("s")
    assert log.committed() == {}
    assert log.commit("s", TABLE.slice(0, 2), "f")
    assert CommitLog(log.folder).read("s").num_rows == 2


def test_content_decides_the_identity_not_the_time_of_writing(root: str) -> None:
    one, two = join(root, "one", "f"), join(root, "two", "f")
    storage.write_bytes(one, b"same")
    storage.write_bytes(two, b"same")
    first = content_id(join(root, "one"))
    assert content_id(join(root, "two")) == first
    storage.write_bytes(two, b"other")
    assert content_id(join(root, "two")) != first
    assert content_id(join(root, "none")) == "absent"


def test_publishing_replaces_a_folder_and_localize_brings_it_back(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELEVANCE_RAY_CACHE", str(tmp_path / "cache"))
    for content in ("old", "new"):
        local = tmp_path / f"made-{content}"
        local.mkdir()
        (local / "config.json").write_text(content)
        storage.publish_folder(local, join(root, "step", "model"))
    assert (storage.localize(join(root, "step", "model")) / "config.json").read_text() == "new"
    assert (storage.localize(join(root, "step", "model", "config.json"))).read_text() == "new"


def test_a_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint("golden", {"a": 1}) == "544f193885ea"


def test_a_second_driver_is_refused_by_name(root: str) -> None:
    with (
        Lease(root),
        pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .*choose another"),
        Lease(root),
    ):
        pass
    with Lease(root):
        pass


def _hold(root: str) -> None:
    with Lease(root):
        Path(root, "held").touch()
        time.sleep(60)


def test_a_killed_drivers_lease_is_free_at_once_on_disk(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(str(tmp_path),))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.05)
    with pytest.raises(UserError, match=f"process {process.pid}"), Lease(str(tmp_path)):
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with Lease(str(tmp_path)):
        pass


def test_a_dead_heartbeat_is_taken_over_on_s3(s3_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    root = "s3://bucket/taken-over"
    dead = {"host": "gone", "pid": 1, "token": "dead", "heartbeat": time.time() - 1000}
    storage.write_json(join(root, "lease.json"), dead)
    with Lease(root):
        assert storage.read_json(join(root, "lease.json"))["pid"] == os.getpid()
    assert not storage.exists(join(root, "lease.json"))


def test_a_process_seen_to_be_gone_is_waited_for_by_nobody_on_s3(s3_server: None) -> None:
    root = "s3://bucket/gone"
    path = join(root, "lease.json")
    with Lease(root):
        own = storage.read_json(path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for change in ({"machine": "another 4026531836"}, {"machine": ""}, {"pid": os.getpid()}):
        storage.write_json(path, own | {"pid": gone.pid} | change)
        with pytest.raises(UserError, match="in use by process"), Lease(root):
            pass
    storage.write_json(path, own | {"pid": gone.pid})
    assert lease_holder(root) is None
    with Lease(root):
        assert storage.read_json(path)["pid"] == os.getpid()


def test_of_two_that_find_a_dead_driver_one_takes_over_on_s3(s3_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    root = "s3://bucket/contended"
    dead = {"host": "gone", "pid": 1, "token": "dead", "heartbeat": time.time() - 1000}
    storage.write_json(join(root, "lease.json"), dead)
    first, second = Lease(root), Lease(root)
    with first:
        with pytest.raises(UserError, match="in use by process"):
            second._take_over(dead)  # which it had found before the first one's write
        assert storage.read_json(join(root, "lease.json"))["token"] == first._owner["token"]
    storage.write_json(join(root, "lease.json"), dead)
    storage.write_json(join(root, "lease.json.dead"), dead | {"token": "died, too"})
    with pytest.raises(UserError, match="in use by process 1 on gone"), Lease(root):
        pass
    with Lease(root):
        pass
    assert storage.listdir(root) == []


def test_an_unknown_kind_of_path_is_the_users_to_mend() -> None:
    with pytest.raises(UserError, match="nosuch://x.*local folder or s3://"):
        storage.exists("nosuch://x")


def test_what_is_not_there_on_s3_is_told_in_one_sentence(s3_server: None) -> None:
    storage.check_reachable("s3://bucket/not/yet")
    with pytest.raises(UserError, match="cannot reach s3://no-such-bucket/run .*make the bucket"):
        storage.check_reachable("s3://no-such-bucket/run")
    with pytest.raises(UserError, match="nothing at s3://bucket/no/model"):
        storage.localize("s3://bucket/no/model")


def test_an_endpoint_that_does_not_answer_is_told_in_one_sentence(
    s3_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match="cannot reach s3://bucket/run .*AWS_ENDPOINT_URL"):
        storage.check_reachable("s3://bucket/run")
    s3fs.S3FileSystem.clear_instance_cache()


def test_credentials_in_an_endpoints_address_are_not_told() -> None:
    error = ConnectionError('Could not connect to the endpoint URL: "http://me:secret@store:9/bucket?x=@"')
    assert why(error) == 'Could not connect to the endpoint URL: "http://store:9/bucket?x=@"'


def test_who_holds_a_lease_is_known_from_outside(root: str) -> None:
    assert lease_holder(root) is None
    with Lease(root):
        holder = lease_holder(root)
        assert holder is not None
        assert holder["pid"] == os.getpid()
    assert lease_holder(root) is None


def test_a_shard_is_replaced_only_where_it_is_still_the_one_that_was_read(root: str) -> None:
    log = CommitLog(root)
    old, new = (pa.table({"x": [number]}) for number in (1, 2))
    log.commit("s", old, "f")
    first = CommitLog(root).committed()["s"]["file"]
    assert log.replace("s", new, "f", instead_of=first)
    assert CommitLog(root).read("s") == new
    assert not log.replace("s", old, "f", instead_of=first)
    assert CommitLog(root).read("s") == new
    assert CommitLog(root).sweep() == 2
