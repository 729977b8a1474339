"""Models shared out over workers (FSDP, arXiv 2304.11277): what code that only runs a model must know of it.

Every worker must make the same number of passes, since each gathers the layers as it comes to them; so a worker with less to
do makes empty ones.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def equal_calls(model: nn.Module, num_calls: int) -> int:
    """How many passes this worker must make: its own number, or, where the model is shared out, the most of any worker.
    Collective there."""
    if not is_sharded(model):
        return num_calls
    most = torch.tensor(num_calls, device=next(model.parameters()).device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
