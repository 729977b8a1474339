"""Exactly once, whatever dies: the driver killed twice, a node lost, S3 that answers with errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from labeling_job import GROUPS, NUM_SHARDS, PRODUCTS, labels_of

from relevance_ray.storage import CommitLog, join

SCRIPT = Path(__file__).with_name("labeling_job.py")


def start(root: str, seconds: float, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), root, str(seconds), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


def wait_for_commits(root: str, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(CommitLog(join(root, "label")).committed()) < count:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def assert_labeled_once(root: str, undisturbed: str) -> None:
    """Every pair has one label, the one it has in an undisturbed run, byte for byte shard by shard."""
    expected = CommitLog(join(undisturbed, "label")).committed()
    found = CommitLog(join(root, "label")).committed()
    assert {name: record["checksum"] for name, record in found.items()} == {
        name: record["checksum"] for name, record in expected.items()
    }
    labels = labels_of(root)
    assert len(labels) == len({pair for pair, _ in labels}) == NUM_SHARDS * GROUPS * PRODUCTS
    assert labels == labels_of(undisturbed)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("undisturbed"))
    finish(start(root, 0.0))
    return root


def kill_twice_then_finish(root: str) -> str:
    """Kill -9 the driver after the first commit, and its successor halfway; what the third run says."""
    for commits in (1, NUM_SHARDS // 2):
        process = start(root, 0.4)
        wait_for_commits(root, commits, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert len(CommitLog(join(root, "label")).committed()) < NUM_SHARDS
    return finish(start(root, 0.0))


def test_a_driver_killed_twice_loses_and_repeats_nothing_that_was_committed(tmp_path: Path, undisturbed: str) -> None:
    said = kill_twice_then_finish(str(tmp_path))
    skipped = int(said.split("'skipped': ")[1].split(",")[0])
    assert skipped >= NUM_SHARDS // 2
    assert_labeled_once(str(tmp_path), undisturbed)


@pytest.mark.slow
def test_a_driver_killed_twice_on_s3(s3_server: None, undisturbed: str) -> None:
    kill_twice_then_finish("s3://bucket/killed-twice")
    assert_labeled_once("s3://bucket/killed-twice", undisturbed)


@pytest.mark.slow
def test_a_node_that_dies_while_labeling_takes_nothing_along(tmp_path: Path, undisturbed: str) -> None:
    said = finish(start(str(tmp_path), 1.0, "--lose-a-node"))
    assert "node killed" in said
    assert "nodes left: 1" in said
    assert_labeled_once(str(tmp_path), undisturbed)
