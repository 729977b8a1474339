"""Compaction on Ray: each file a task, as many at once as there are CPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from relevance_ray.labeling.compaction import Do, Part


def in_ray_tasks(do: Do, parts: Sequence[Part]) -> Iterator[int]:
    """Do each part in a Ray task; ray must be initialised. A task whose worker died is done again; the first error of
    another kind ends the rest, and is raised as what it was."""
    import ray

    @ray.remote(num_cpus=1, max_retries=2)
    def one(part: Part) -> int:
        return do(part)

    waiting = [one.remote(part) for part in parts]
    try:
        while waiting:
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        for task in waiting:
            ray.cancel(task)
