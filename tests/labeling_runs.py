"""Runs of `labeling_job.py` in processes of their own, and what must be true of the labels they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from labeling_job import GROUPS, NUM_SHARDS, PRODUCTS, labels_of

from relevance_ray.storage import CommitLog, join

SCRIPT = Path(__file__).with_name("labeling_job.py")


def start(root: str, seconds: float, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The job, begun; its engine takes so many seconds a shard."""
    command = [sys.executable, str(SCRIPT), root, str(seconds), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What a job said, that must end well."""
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


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
