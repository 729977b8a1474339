"""How a model, its gradients and its optimizer lie on the workers: a copy on each, or shared out.

A copy on each: gradients lie in one flat buffer, summed over workers at once after the backward pass. Shared out (FSDP):
each worker holds a part of every layer and of its optimizer, for models that none can hold whole; layers are gathered as
they are needed, and gradients summed as they come. Both keep whole weights and optimizer states, on worker 0 alone, so a
run may go on under the other, and on another number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from relevance_ray import distributed
from relevance_ray.sharding import equal_calls
from relevance_ray.training.options import FitOptions

Weights = dict[str, torch.Tensor]


class Placement(Protocol):
    """A model on the workers. All methods are collective.

    Attributes:
        model: on its device.
        optimizer: of its trained parameters.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def begin_step(self) -> None:
        """Forget the gradients of the step before."""

    def num_micro_batches(self, own: int) -> int:
        """How many this worker must run through the model where it has so many."""

    def end_step(self, max_norm: float) -> float:
        """Sum the gradients over workers and clip them; their norm before."""

    def weights(self) -> Weights:
        """The trained weights, whole, on worker 0's CPU; nothing on the others."""

    def load_weights(self, weights: Weights) -> None:
        """Put worker 0's whole weights back on all workers; the others give none."""

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state, whole, on worker 0's CPU; nothing on the others."""

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Put worker 0's whole state back on all workers; the others give none."""


class Replicated:
    """A copy on each worker."""

    def __init__(self, model: nn.Module, device: torch.device, options: FitOptions) -> None:
        self.model = model.to(device)
        _share_initial_weights(self.model, device)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._gradient = _flat_gradient(self._parameters)
        self.optimizer = _adamw(self._parameters, options, fused=True)

    def begin_step(self) -> None:
        self._gradient.zero_()

    def num_micro_batches(self, own: int) -> int:
        return own

    def end_step(self, max_norm: float) -> float:
        distributed.all_reduce_sum(self._gradient)
        norm = float(self._gradient.norm())
        self._gradient.mul_(min(1.0, max_norm / (norm + 1e-6)))
        return norm

    def weights(self) -> Weights:
        return _on_worker_0(_trained(self.model))

    def load_weights(self, weights: Weights) -> None:
        if distributed.rank() == 0:
            load_trained_weights(self.model, weights)
        for parameter in self._parameters:
            distributed.broadcast(parameter.data)

    def optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict() if distributed.rank() == 0 else {}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        device = self._parameters[0].device
        self.optimizer.load_state_dict(
            _state_from_worker_0(state, lambda _, value: distributed.broadcast(value.to(device, copy=True)))
        )


class Sharded:
    """Shared out over all workers, layer by layer."""

    def __init__(self, model: nn.Module, device: torch.device, options: FitOptions) -> None:
        _share_initial_weights(model, device)
        mesh = init_device_mesh(device.type, (distributed.world_size(),))
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh)
        self.model: nn.Module = fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # a sum, as a loss is already over the global batch
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = _adamw(self._parameters, options, fused=False)

    def begin_step(self) -> None:
        self.optimizer.zero_grad()

    def num_micro_batches(self, own: int) -> int:
        return equal_calls(self.model, own)

    def end_step(self, max_norm: float) -> float:
        norm: Any = nn.utils.clip_grad_norm_(self._parameters, max_norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def weights(self) -> Weights:
        return _on_worker_0(_trained(self.model))

    def load_weights(self, weights: Weights) -> None:
        with torch.no_grad():
            for name, parameter in _trained(self.model).items():
                value = weights[name] if distributed.rank() == 0 else torch.empty(parameter.shape)
                parameter.copy_(_share_of(parameter, value))

    def optimizer_state(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        whole = {index: _on_worker_0(values) for index, values in state["state"].items()}
        return {**state, "state": whole} if distributed.rank() == 0 else {}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

        def share(index: int, value: torch.Tensor) -> torch.Tensor:
            if value.ndim:
                return _share_of(parameters[index], value)
            return distributed.broadcast(value.to(parameters[index].device, copy=True))

        self.optimizer.load_state_dict(_state_from_worker_0(state, share))


def place(model: nn.Module, device: torch.device, options: FitOptions) -> Placement:
    """A model on the workers, as the options say; one worker alone has nothing to share out with."""
    kind = Sharded if options.sharded and distributed.world_size() > 1 else Replicated
    return kind(model, device, options)


def load_trained_weights(model: nn.Module, weights: Weights) -> None:
    """Put `Placement.weights` into a model that is not shared out, in place."""
    parameters = _trained(model)
    assert parameters.keys() == weights.keys(), sorted(parameters.keys() ^ weights.keys())[:5]
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _share_initial_weights(model: nn.Module, device: torch.device) -> None:
    """Worker 0's weights on all workers, one tensor at a time. Collective."""
    for parameter in _trained(model).values():
        parameter.data.copy_(distributed.broadcast(parameter.data.to(device)))


def _on_worker_0(tensors: Mapping[str, torch.Tensor]) -> Weights:
    """Whole tensors on worker 0's CPU, gathered one at a time; nothing on the others. Collective where they are shared
    out."""
    kept: Weights = {}
    for name, tensor in tensors.items():
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if distributed.rank() == 0:
            kept[name] = whole.cpu().clone()
    return kept


def _state_from_worker_0(state: dict[str, Any], share: Callable[[int, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """An optimizer's state on all workers of what worker 0 has, each tensor shared by `share`. Collective."""
    known = {
        "param_groups": state.get("param_groups"),
        "shapes": {
            index: {key: (value.shape, value.dtype) for key, value in values.items()}
            for index, values in state.get("state", {}).items()
        },
    }
    known = distributed.broadcast_object(known)
    tensors: dict[int, dict[str, torch.Tensor]] = {}
    for index, shapes in known["shapes"].items():
        tensors[index] = {}
        for key, (shape, dtype) in shapes.items():
            value = state["state"][index][key] if distributed.rank() == 0 else torch.empty(shape, dtype=dtype)
            tensors[index][key] = share(index, value)
    return {"state": tensors, "param_groups": known["param_groups"]}


def _share_of(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """This worker's share of a whole tensor, of which worker 0's counts, laid out as a parameter is. Collective."""
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _layers(model: nn.Module) -> nn.ModuleList:
    """The transformer's layers: its longest module list."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def _flat_gradient(parameters: list[nn.Parameter]) -> torch.Tensor:
    """One buffer whose pieces are the parameters' gradients, so that all of them are summed over workers at once."""
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    offset = 0
    for parameter in parameters:
        parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    return flat


def _adamw(parameters: list[nn.Parameter], options: FitOptions, *, fused: bool) -> torch.optim.AdamW:
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=options.learning_rate, fused=fused)
