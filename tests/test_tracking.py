"""What TensorBoard is shown of a training."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from relevance_ray.training.tracking import TensorBoard


def events(folder: Path) -> Iterator[Event]:
    """The events of a folder's files, as TensorBoard reads them: each with its length before and checksums around it."""
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    return [(v.tag, event.step, round(v.simple_value, 4)) for event in events(folder) for v in event.summary.value]


def restarts(folder: Path) -> list[int]:
    return [event.step for event in events(folder) if event.HasField("session_log")]


def test_losses_and_dev_metrics_are_shown_by_part(tmp_path: Path) -> None:
    with TensorBoard(tmp_path) as board:
        board({"step": 1, "loss": 2.0, "pairs": 64, "pairs_per_second": 10.0})
        board({"step": 1, "dev": {"ndcg": 0.5}})
        board({"step": 1, "loss": 3.0, "part": "member 0, fold 1 of 2"})
    assert scalars(tmp_path) == [
        ("train/loss", 1, 2.0),
        ("train/pairs_per_second", 1, 10.0),
        ("dev/ndcg", 1, 0.5),
    ]
    assert scalars(tmp_path / "member-0--fold-1-of-2") == [("train/loss", 1, 3.0)]


def test_steps_that_a_kill_undid_are_forgotten(tmp_path: Path) -> None:
    with TensorBoard(tmp_path) as board:
        for step in (1, 2, 3, 4):
            board({"step": step, "loss": 1.0})
        for step in (3, 4, 5):  # a worker died within this driver
            board({"step": step, "loss": 0.5})
    assert restarts(tmp_path) == [1, 3]


def test_nothing_is_written_of_a_training_that_is_done(tmp_path: Path) -> None:
    with TensorBoard(tmp_path / "tensorboard"):
        pass
    assert not (tmp_path / "tensorboard").exists()
