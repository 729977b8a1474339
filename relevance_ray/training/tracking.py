"""A training's curves for TensorBoard, from the lines of its log.

Written by the driver, so that workers need nothing for it, be there one or a hundred. A run that goes
on after a kill writes on behind the step it resumed from, and TensorBoard forgets what stood there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

SHOWN = ("loss", "grad_norm", "learning_rate", "pairs_per_second", "groups_per_second")


class TensorBoard:
    """Event files of a training, one folder a part of it ("member 0, fold 1 of 2").

    Args:
        folder: for `tensorboard --logdir`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[str, Any] = {}
        self._last: dict[str, int] = {}

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Write down a line of the log."""
        if "dev" not in record and not any(name in record for name in SHOWN):
            return
        part, step = str(record.get("part", "")), int(record["step"])
        if step < self._last.get(part, step):  # a worker died, and the others went back to a checkpoint with it
            self._writers.pop(part).close()
        writer, self._last[part] = self._writer(part, step), step
        for name in SHOWN:
            if name in record:
                writer.add_scalar(f"train/{name}", record[name], step)
        for name, value in record.get("dev", {}).items():
            writer.add_scalar(f"dev/{name}", value, step)

    def _writer(self, part: str, step: int) -> Any:
        if part not in self._writers:
            from tensorboardX import SummaryWriter

            name = "".join(char if char.isalnum() else "-" for char in part)
            self._writers[part] = SummaryWriter(
                str(self.folder / name), purge_step=step, filename_suffix=f".{os.getpid()}.{step}"
            )
        return self._writers[part]
