"""What a step asks of a cluster: so many actors or workers, and what each of them takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Workers:
    """Actors, tasks or training workers of one kind.

    Attributes:
        count: how many.
        cpus, gpus: logical ones of each.
        resources: custom resources of each, by name. Ray puts it where they are.
    """

    count: int
    cpus: float = 1
    gpus: float = 0
    resources: Mapping[str, float] = field(default_factory=dict)

    def of(self, count: int) -> Workers:
        """The same, of so many."""
        return replace(self, count=count)

    def at_most(self, count: int) -> Workers:
        """The same, of so many at most."""
        return self.of(min(self.count, count))

    def each(self) -> dict[str, float]:
        """What one takes, by the names that Ray has for it; nothing that it takes none of."""
        named = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: amount for name, amount in named.items() if amount}

    def remote_options(self) -> dict[str, Any]:
        """What one takes, as options of a Ray task or actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": dict(self.resources) or None}


ONE = Workers(1)


@dataclass(frozen=True)
class Demand:
    """What a step wants at once.

    Attributes:
        workers: all that it wants.
        key: the configuration's that says how many.
        at_least: with fewer it cannot begin.
        beside: others of the step that hold what they take meanwhile.
    """

    workers: Workers
    key: str
    at_least: int
    beside: Workers = Workers(0)
