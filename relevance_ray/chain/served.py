"""What the `serve` command is pointed at: a run's configuration, or a model folder with nothing around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from relevance_ray.config import Config, build_config
from relevance_ray.errors import UserError
from relevance_ray.serving.options import ServeOptions
from relevance_ray.steps import Chain
from relevance_ray.storage import absolute, join


@dataclass(frozen=True)
class Served:
    """A model to serve.

    Attributes:
        model: its folder, local or s3://.
        options: how to serve it.
        newest: the folder that is to take its place when that is asked for.
    """

    model: str
    options: ServeOptions
    newest: Callable[[], str]


def student_of_run(config: Config) -> Served:
    """The student of a configuration; what it needs is run first. Judged test queries become the page's examples."""
    from relevance_ray.serving.examples import judged_examples, write_examples

    chain = Chain(config)
    model, options = chain.student(), config.serve
    if not options.examples:
        path = join(chain.at.root, "examples.jsonl")
        write_examples(path, judged_examples(chain.prepared()))
        options = replace(options, examples=path)
    return Served(absolute(model), options, chain.newest_student)


def model_folder(folder: str, overrides: Sequence[str] = ()) -> Served:
    """A model folder, with `serve.*` overrides."""
    for text in overrides:
        if not text.strip().startswith("serve."):
            raise UserError(
                f"--set {text!r}: of a model folder only serve.* can be set; give a configuration for the rest"
            )
    return Served(folder, build_config({}, overrides).serve, lambda: folder)
