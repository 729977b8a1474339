"""The few collective operations the loop needs, each of which also works in one process without a group.

So a single worker, `torchrun` and Ray Train run the same lines; who starts the process group is not this module's concern.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    """This worker's place among all, 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all workers, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Worker 0's values on all workers, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def broadcast_object(value: Any) -> Any:
    """Worker 0's value on all workers."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every worker's value, in rank order, on all workers."""
    values: list[Any] = [None] * world_size()
    if world_size() == 1:
        return [value]
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
