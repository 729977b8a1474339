"""What Ray's processes load for a training: the worker's function, and the board where workers put what the driver should
know.

Nothing heavy is imported before a worker runs: Ray Train's controller and the board's process load this module too, and
torch and transformers would cost each of them seconds before the first step.
"""

from __future__ import annotations

import os
from typing import Any

from ray import cloudpickle

from relevance_ray.errors import what_to_mend


def work(config: dict[str, Any]) -> None:
    """Train, as one of the group's workers: `jobs` (pickled), `num_threads`, `use_gpu`, `board`, `follow` (whether anybody
    reads the log's lines)."""
    import ray.train.torch
    import torch

    from relevance_ray.training.runners import local_runner

    torch.set_num_threads(config["num_threads"])
    if config["use_gpu"]:
        torch.cuda.set_device(ray.train.torch.get_device())
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that was not asked for is somebody else's
    board = config["board"]
    if ray.get(board.error.remote()):
        return  # all were started anew because of it: the driver tells

    def tell(record: dict[str, Any]) -> None:
        board.put.remote(record)

    try:
        local_runner(cloudpickle.loads(config["jobs"]), tell if config["follow"] else None)
    except Exception as error:
        if said := what_to_mend(error):
            ray.get(board.fail.remote(said))
        raise  # Ray ends the other workers, which might wait for this one for ever


class Board:
    """Where workers put what the driver should know; an actor."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._error = ""

    def put(self, record: dict[str, Any]) -> None:
        self._records.append(record)

    def take(self) -> list[dict[str, Any]]:
        """The lines that came since they were last taken."""
        taken, self._records = self._records, []
        return taken

    def fail(self, message: str) -> None:
        self._error = message

    def error(self) -> str:
        return self._error
