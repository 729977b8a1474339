"""Ray Serve around the scorer: the shell that puts a model folder behind HTTP on this machine.

The application itself is `http.create_app`, built inside each replica once its model is loaded, so a folder that does
not load never takes traffic. A taken port, or a folder that holds no finished model, is refused before Ray starts,
which would take seconds to say the same.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from fastapi import FastAPI
from ray import serve

from relevance_ray.errors import UserError
from relevance_ray.ray_session import in_local_session, ray_session
from relevance_ray.serving.http import create_app
from relevance_ray.serving.options import ServeOptions
from relevance_ray.serving.scorer import Scorer, StrPath, read_calibrated_info

APPLICATION = "relevance_ray"
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@serve.ingress()
class ScoringReplica:
    """One copy of the model. Ray Serve asks it for its application after the model is loaded."""

    def __init__(self, model_folder: str, num_threads: int, device: str) -> None:
        self.scorer = Scorer(Path(model_folder), device=device, num_threads=num_threads)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.scorer)


def build_application(model_folder: Path, options: ServeOptions) -> serve.Application:
    """The Serve application of a model folder, not yet running."""
    deployment = serve.deployment(ScoringReplica).options(
        name="scorer",
        num_replicas=options.num_replicas,
        ray_actor_options={"num_cpus": options.cpus_per_replica, "num_gpus": options.gpus_per_replica},
        max_ongoing_requests=16,  # /health shares the slots with /score: it must not wait behind a few long requests
    )
    device = "cuda" if options.gpus_per_replica > 0 else "cpu"
    return deployment.bind(str(model_folder.resolve()), options.cpus_per_replica, device)


@contextlib.contextmanager
def running_server(
    model_folder: StrPath, host: str = "127.0.0.1", port: int = 8000, options: ServeOptions | None = None
) -> Iterator[str]:
    """Serve a model folder inside a `with` block; yields the base URL once requests are answered.

    `port` 0 picks a free one; host 0.0.0.0 opens the server to the network. Uses the Ray that is running, or starts one
    and stops it at the end. Raises `UserError` for a folder that is no finished model and for an address that cannot be
    bound.
    """
    options = options or ServeOptions()
    model_folder = Path(model_folder)
    read_calibrated_info(model_folder)
    port = _free_port(host, port)
    with contextlib.ExitStack() as cleanup:  # undone from the last line up
        handlers = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
        cleanup.callback(_handle_signals, handlers)
        cleanup.enter_context(ray_session())
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
        cleanup.callback(_stop_serve)
        # A second, impatient Ctrl-C must not cut the shutdown short: it would leave Ray's processes behind.
        cleanup.callback(_handle_signals, dict.fromkeys(_STOP_SIGNALS, signal.SIG_IGN))
        application = build_application(model_folder, options)
        serve.run(application, name=APPLICATION, route_prefix="/", logging_config=quiet)
        yield f"http://{_reachable(host)}:{port}"


def serve_model(
    model_folder: StrPath, host: str = "127.0.0.1", port: int = 8000, options: ServeOptions | None = None
) -> None:
    """Serve until Ctrl-C or SIGTERM, then stop cleanly. Errors as `running_server`."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with running_server(model_folder, host, port, options) as url:
            print(f"Serving {model_folder} at {url}; POST {url}/score, docs at {url}/docs; Ctrl-C stops.", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        print("Stopped.", flush=True)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _handle_signals(handlers: Mapping[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _stop_serve() -> None:
    if in_local_session():
        serve.delete(APPLICATION)  # lets requests in flight end; the rest of Serve goes with its Ray
    else:
        serve.shutdown()


def _free_port(host: str, port: int) -> int:
    if not 0 <= port <= 65535:
        raise UserError(f"port {port} does not exist; choose one from 0 (any free one) to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, port {port} ({error.strerror}); choose others by --host, --port"
        ) from error


def _reachable(host: str) -> str:
    loopback = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
    return loopback.get(host, f"[{host}]" if ":" in host else host)
