"""Whether Ray can hold what a step wants, asked before the step waits for it.

Ray lets an actor that no node can hold wait for ever, without a word. So the nodes that are there are asked first, and where
a cluster grows by itself (KubeRay, `ray up`), the kinds of nodes that it may still get.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

from relevance_ray.errors import UserError
from relevance_ray.ray_session import PLENTY, local_cpus, local_gpus, ray_session
from relevance_ray.workers import ONE, Demand, Workers

Node = dict[str, float]
"""What a node has in all, by the names that Ray has for it."""


def check_demands(demands: Sequence[Demand], num_cpus: int | None = None) -> list[str]:
    """Refuse what can never be held, and tell what must wait for a cluster to grow.

    Args:
        demands: each alone, one after the other.
        num_cpus: as `ray_session` would get it.

    Returns:
        A sentence for each demand that the nodes which are there cannot hold whole.

    Raises:
        UserError: too little for a step to begin, now and when the cluster has grown as far as it may.
    """
    if not demands:
        return []
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        there, later = _cluster(max(demand.workers.count for demand in demands))
    elif os.environ.get("RAY_ADDRESS"):
        with ray_session():
            there, later = _cluster(max(demand.workers.count for demand in demands))
    else:
        names = {name for demand in demands for name in demand.workers.resources}
        gpus = local_gpus() if any(demand.workers.gpus for demand in demands) else 0
        there, later = [{"CPU": local_cpus(num_cpus), "GPU": gpus, **dict.fromkeys(names, PLENTY)}], []
    return [said for demand in demands if (said := _check(demand, there, later))]


def _check(demand: Demand, there: Sequence[Node], later: Sequence[Node]) -> str:
    workers, now = demand.workers, room(there, demand)
    if now >= workers.count:
        return ""
    each = _told(workers.each())
    beside = f" beside {demand.taken_cpus} CPUs that are taken" if demand.taken_cpus else ""
    asked = f"{demand.key} asks for {workers.count} at {each} each{beside}"
    if max(now, room(later, demand)) < demand.at_least:
        grown = " even when it has grown as far as it may" if later else ""
        raise UserError(
            f"{asked}, and this Ray has room for {max(now, room(later, demand))}{grown} (its nodes: "
            f"{_nodes_told(later or there)}); lower it or what each one takes, or start such nodes"
        )
    return f"{asked}; there is room for {now} now{', and the others wait for the cluster to grow' if later else ''}"


def room(nodes: Iterable[Node], demand: Demand) -> int:
    """How many of the workers the nodes can hold together, whatever else runs there but what the demand says is taken."""
    free = [dict(node) for node in nodes]
    _put(free, ONE.of(demand.taken_cpus))
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


def _cluster(most: int) -> tuple[list[Node], list[Node]]:
    """The nodes that are there, and all that there may be where the cluster grows by itself, of each kind no more than
    `most`."""
    import ray

    there = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    # The only way to the autoscaler's own account of what it may start; Ray Train looks there, too.
    config = ray._private.state.state.get_cluster_config()
    later: list[Node] = []
    for group in config.node_group_configs if config is not None else ():
        count = most if group.max_count < 0 else min(most, group.max_count)
        later += [{name: float(amount) for name, amount in group.resources.items()}] * count
    return there, later


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
