"""Whether Ray can hold what a step wants, asked before the step waits for it.

Ray lets an actor that no node can hold wait for ever, without a word. So the nodes that are there are asked first. What a
cluster that grows by itself (KubeRay, `ray up`) may still get, Ray does not tell: its user says that it does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

from relevance_ray.cluster.session import PLENTY, in_local_session, local_cpus, local_gpus, ray_session
from relevance_ray.cluster.workers import Demand, Workers
from relevance_ray.errors import UserError

Node = dict[str, float]
"""What a node has in all, by the names that Ray has for it."""


def check_demands(demands: Sequence[Demand], num_cpus: int | None = None, *, autoscaling: bool = False) -> list[str]:
    """Refuse what can never be held, and tell what must wait.

    Args:
        demands: each alone, one after the other.
        num_cpus: as `ray_session` would get it.
        autoscaling: the cluster starts nodes for what is asked of it, so it is waited for.

    Returns:
        A sentence for each demand that the nodes which are there cannot hold whole.

    Raises:
        UserError: too little for a step to begin.
    """
    if not demands:
        return []
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        nodes = _nodes()
    elif os.environ.get("RAY_ADDRESS"):
        with ray_session():
            nodes = _nodes()
    else:
        names = {name for demand in demands for name in (*demand.workers.resources, *demand.beside.resources)}
        gpus = local_gpus() if any(demand.workers.gpus for demand in demands) else 0
        nodes = [{"CPU": local_cpus(num_cpus), "GPU": gpus, **dict.fromkeys(names, PLENTY)}]
    grows = autoscaling and not in_local_session() and bool(os.environ.get("RAY_ADDRESS"))
    return [said for demand in demands if (said := _check(demand, nodes, grows))]


def _check(demand: Demand, nodes: Sequence[Node], grows: bool) -> str:
    workers, now = demand.workers, room(nodes, demand)
    if now >= workers.count:
        return ""
    beside = f" beside {demand.beside.count} others of the step" if demand.beside.count else ""
    asked = f"{demand.key} asks for {workers.count} at {_told(workers.each())} each{beside}"
    if now < demand.at_least and not grows:
        where = ", or set resources.autoscaling where the cluster starts them" if os.environ.get("RAY_ADDRESS") else ""
        raise UserError(
            f"{asked}, and this Ray has room for {now} (its nodes: {_nodes_told(nodes)}); lower it or what each one takes, "
            f"or start such nodes{where}"
        )
    return f"{asked}; there is room for {now} now{', and the others wait for the cluster to grow' if grows else ''}"


def room(nodes: Iterable[Node], demand: Demand) -> int:
    """How many of the workers the nodes can hold together, whatever else runs there but what the demand says is taken."""
    free = [dict(node) for node in nodes]
    _put(free, demand.beside)
    return _put(free, demand.workers)


def _put(free: Sequence[Node], workers: Workers) -> int:
    """Put workers on nodes, first come first served, and return how many there was room for."""
    placed, each = 0, workers.each()
    for node in free:
        left = workers.count - placed
        fit = min([left, *(int(min(left, node.get(name, 0) / amount + 1e-6)) for name, amount in each.items())])
        for name, amount in each.items():
            node[name] = node.get(name, 0) - fit * amount
        placed += fit
    return placed


def _nodes() -> list[Node]:
    """The nodes of the cluster that this process is part of."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _told(amounts: Node) -> str:
    plural = {"CPU": "CPUs", "GPU": "GPUs"}
    return ", ".join(
        f"{amount:g} {name if amount == 1 else plural.get(name, name)}" for name, amount in amounts.items()
    )


def _nodes_told(nodes: Sequence[Node]) -> str:
    """Kinds of nodes and how many there are of each, without what Ray itself counts."""
    kinds: dict[str, int] = {}
    for node in nodes:
        kept = {
            name: amount
            for name, amount in node.items()
            if not name.startswith("node:") and name not in ("memory", "object_store_memory") and amount < PLENTY
        }
        if told := _told(dict(sorted(kept.items()))):  # a head often has nothing
            kinds[told] = kinds.get(told, 0) + 1
    return "; ".join(f"{count} with {told}" for told, count in sorted(kinds.items())) or "none"
