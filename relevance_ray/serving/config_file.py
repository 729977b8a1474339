"""The Ray Serve configuration of a model for a cluster: `serve deploy` and KubeRay's RayService take it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml

from relevance_ray.options import changed
from relevance_ray.serving.options import ServeOptions
from relevance_ray.storage import absolute, write_bytes

APPLICATION = "relevance_ray"
_HEAD = """# {model}, served by Ray Serve.
# Start or change it: serve deploy FILE. In a KubeRay RayService it is the text of spec.serveConfigV2.
# Every node needs the package relevance_ray, and what args name: the model, and the files among the options.
# A new model is rolled out, without a request unanswered, by its folder in args.model and another serve deploy. One that
# does not load takes no traffic, and the old one goes on; deploy the old folder again then, or Serve starts no replica anew.
"""


def serve_config(model: str, host: str, port: int, options: ServeOptions) -> dict[str, Any]:
    """What Ray's `ServeDeploySchema` describes.

    Args:
        model: folder that every node can read, local or s3://.
        host: that the proxy of each node binds.
        options: those at their default are left out.
    """
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "relevance_ray.serving.app:build",
                "args": {"model": absolute(model), "options": changed(absolute_paths(options))},
            }
        ],
    }


def absolute_paths(options: ServeOptions) -> ServeOptions:
    """The same options with paths that mean the same wherever a process stands."""
    return replace(
        options,
        first_stage=options.first_stage and absolute(options.first_stage),
        tokens_file=options.tokens_file and absolute(options.tokens_file),
        examples=options.examples and absolute(options.examples),
        shadow_log=options.shadow_log and absolute(options.shadow_log),
    )


def write_serve_config(path: str, model: str, host: str, port: int, options: ServeOptions) -> None:
    """Write `serve_config` as YAML."""
    text = yaml.safe_dump(serve_config(model, host, port, options), sort_keys=False)
    write_bytes(path, (_HEAD.format(model=absolute(model)) + text).encode())
