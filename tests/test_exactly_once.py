"""Exactly once, whatever dies: the driver killed twice, a node lost (for an S3 that fails, see test_s3_faults.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from labeling_job import NUM_SHARDS
from labeling_runs import assert_labeled_once, finish, start

from relevance_ray.storage import CommitLog, join


def wait_for_commits(root: str, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(CommitLog(join(root, "label")).committed()) < count:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


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
