"""Ray Serve around the scorer: the shell that puts a model folder behind HTTP, on this machine or on a cluster.

The application itself is `http.create_app`, built inside each replica once its model is loaded, so a folder that does
not load never takes traffic. A taken port, or a folder that holds no finished model, is refused before Ray starts,
which would take seconds to say the same. A new model is rolled out by building the application again: its replicas
start, and only then the old ones end what they are at and stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import shutil
import signal
import socket
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from fastapi import FastAPI
from ray import serve

from relevance_ray.cluster.session import in_local_session, ray_session
from relevance_ray.engines.runtimes import RUNTIME_FILE
from relevance_ray.errors import UserError, what_to_mend
from relevance_ray.serving.config_file import APPLICATION, absolute_paths
from relevance_ray.serving.examples import read_examples
from relevance_ray.serving.guard import Tokens
from relevance_ray.serving.http import create_app
from relevance_ray.serving.metrics import FOLDER_VARIABLE
from relevance_ray.serving.options import ServeOptions
from relevance_ray.serving.scorer import Scorer, StrPath, UnscorableError, name_of, read_calibrated_info
from relevance_ray.serving.two_stage import FirstStage, check_first_stage
from relevance_ray.storage import localize, makedirs

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
_TEXT_FIELDS = ("title", "brand", "color", "category", "description", "bullets")
_MAX_CALLERS = 2000
"""Requests that a replica holds at once; nearly all of them can only be bodies that arrive slowly."""


@serve.ingress()
class ScoringReplica:
    """One copy of the model. Ray Serve asks it for its application after the model is loaded."""

    def __init__(self, model_folder: str, options: Mapping[str, Any]) -> None:
        self.options = ServeOptions(**options)
        if folder := os.environ.get(FOLDER_VARIABLE):
            os.makedirs(folder, mode=0o700, exist_ok=True)
        device = "cuda" if self.options.gpus_per_replica > 0 else "cpu"
        threads = self.options.cpus_per_replica
        self.scorer = Scorer(
            localize(model_folder),
            device=device,
            num_threads=threads,
            name=name_of(model_folder),
            score_cache_mb=self.options.score_cache_mb,
            token_cache_mb=self.options.token_cache_mb,
        )
        self.scorer.model_id  # noqa: B018  read now, while the folder is what was loaded
        self.first_stage = None
        if folder := self.options.first_stage:
            first = Scorer(
                localize(folder),
                device=device,
                num_threads=threads,
                name=name_of(folder),
                score_cache_mb=self.options.score_cache_mb,
            )
            first.model_id  # noqa: B018
            self.first_stage = FirstStage(first, self.options.first_stage_keep)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.scorer, self.options, self.first_stage)


def build_application(model_folder: str, options: ServeOptions, metrics_folder: str = "") -> serve.Application:
    """The Serve application of a model folder (local, or s3:// and then copied to each replica's machine), not yet running.

    `metrics_folder` is where the replicas of one machine add up what they count; without it each tells of itself.
    """
    environment = {FOLDER_VARIABLE: metrics_folder} if metrics_folder else {}
    deployment = serve.deployment(ScoringReplica).options(
        name="scorer",
        num_replicas=options.num_replicas,
        ray_actor_options={
            "num_cpus": options.cpus_per_replica,
            "num_gpus": options.gpus_per_replica,
            "runtime_env": {"env_vars": environment},
        },
        # The replica's own queue sheds, by what waits for the model, and its guard by the bytes it holds; slow callers must
        # not keep /health from being answered.
        max_ongoing_requests=_MAX_CALLERS,
        max_queued_requests=_MAX_CALLERS,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        max_surge_percent=100,
        max_constructor_retry_count=3,
        health_check_period_s=2,
        health_check_timeout_s=30,
    )
    return deployment.bind(model_folder, dataclasses.asdict(options))


def build(args: dict[str, Any]) -> serve.Application:
    """What a Serve configuration imports, as `config_file` writes it.

    Args:
        args: `model`, a folder that every node can read, local or s3://; `options`, keys of `ServeOptions`.
    """
    options = ServeOptions(**args.get("options", {}))
    # One folder for this application, whatever it serves: counters go on when a model is replaced.
    folder = os.path.join(tempfile.gettempdir(), f"{APPLICATION}-metrics-{os.getuid()}")
    return build_application(args["model"], options, folder)


class Server:
    """A running server. `roll_out` puts another model in the place of the one it serves.

    Attributes:
        url: that it answers at.
        model_folder: the model that it serves.
    """

    def __init__(self, url: str, model_folder: Path, options: ServeOptions, metrics_folder: str) -> None:
        self.url, self.model_folder = url, model_folder
        self._options, self._metrics_folder = options, metrics_folder

    def start(self) -> None:
        serve.run(
            build_application(str(self.model_folder), self._options, self._metrics_folder),
            name=APPLICATION,
            route_prefix="/",
            logging_config=_QUIET,
        )

    def roll_out(self, model_folder: StrPath) -> None:
        """Serve another model folder, without a request unanswered meanwhile; returns when it has taken over.

        Raises:
            UserError: the folder holds no model that loads and scores, a file among the options cannot be read, or there is
                no room for a second copy; the old one goes on.
        """
        folder = Path(model_folder).resolve()  # once: a link may be moved meanwhile
        check_options(self._options, folder)
        check_model(folder, self._options.gpus_per_replica > 0)
        _check_room(self._options)
        before, self.model_folder = self.model_folder, folder
        try:
            self.start()
        except RuntimeError as error:
            reason = _why_not_started()
            # Serve keeps the old replicas, but starts none anew for them until it is told to serve the old model again.
            self.model_folder = before
            self.start()
            raise UserError(f"{folder} did not start ({reason})") from error


def _why_not_started() -> str:
    """The exception of a replica, as Ray Serve tells it of the deployment that failed: the last line that names one."""
    applications = serve.status().applications
    deployments = applications[APPLICATION].deployments.values() if APPLICATION in applications else ()
    lines = [line.strip() for each in deployments for line in each.message.splitlines() if "Error" in line]
    return lines[-1][:300] if lines else "Ray Serve does not say why"


def _check_room(options: ServeOptions) -> None:
    import ray

    free = ray.available_resources()
    wanted = {"CPU": options.cpus_per_replica, "GPU": options.gpus_per_replica}
    for name, number in wanted.items():
        if in_local_session() and number > free.get(name, 0):
            raise UserError(
                f"a new model loads beside the old one, which takes {number:g} {name}s, and {free.get(name, 0):g} are free; "
                "stop the server and start it with the new model"
            )


def check_options(options: ServeOptions, model_folder: StrPath) -> None:
    """Read the files among the options here, as the replicas of this model will.

    Raises:
        UserError: one of them cannot be read, or the folder of the shadow log not made.
    """
    if options.first_stage:
        check_first_stage(options.first_stage, model_folder)
        check_model(localize(options.first_stage), options.gpus_per_replica > 0)
    if options.tokens_file:
        Tokens.read(options.tokens_file)
    read_examples(options.examples)
    if options.shadow_log:
        try:
            makedirs(options.shadow_log)
        except OSError as error:
            raise UserError(
                f"serve.shadow_log {options.shadow_log} cannot be made ({error.strerror or error}); mend it"
            ) from error


def check_model(model_folder: StrPath, on_gpu: bool = False) -> None:
    """Load a model folder here and score a pair, so that one that cannot is named before any replica tries it.

    Args:
        on_gpu: the replicas will run its weights, also where it was exported for another runtime.

    Raises:
        UserError: it is no finished model, or its files cannot be read.
    """
    read_calibrated_info(Path(model_folder))
    try:
        with _weights_alone(Path(model_folder)) if on_gpu else contextlib.nullcontext(model_folder) as folder:
            Scorer(folder, device="cpu").score("query", [dict.fromkeys(_TEXT_FIELDS, "product")])
    except UnscorableError:
        pass  # it loads, and reads none of these fields
    except UserError:
        raise
    except Exception as error:
        reason = what_to_mend(error) or f"{type(error).__name__}: {str(error)[:200]}".splitlines()[0]
        raise UserError(
            f"{model_folder} does not load ({reason}); give a folder that train-student finished"
        ) from error


@contextlib.contextmanager
def _weights_alone(model_folder: Path) -> Iterator[Path]:
    """The folder as torch runs it."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in model_folder.resolve().iterdir():
            if path.name != RUNTIME_FILE:
                os.symlink(path, Path(scratch) / path.name)
        yield Path(scratch)


@contextlib.contextmanager
def running_server(
    model_folder: StrPath, host: str = "127.0.0.1", port: int = 8000, options: ServeOptions | None = None
) -> Iterator[Server]:
    """Serve a model folder inside a `with` block; yields the server once requests are answered.

    `port` 0 picks a free one; host 0.0.0.0 opens the server to the network. Uses the Ray that is running, or starts one
    and stops it at the end. Raises `UserError` for a folder that is no finished model and for an address that cannot be
    bound, or a file among the options that cannot be read.
    """
    options = absolute_paths(options or ServeOptions())
    model_folder = Path(model_folder).resolve()
    read_calibrated_info(model_folder)
    check_options(options, model_folder)
    port = _free_port(host, port)
    check_model(model_folder, options.gpus_per_replica > 0)
    with contextlib.ExitStack() as cleanup:  # undone from the last line up
        metrics_folder = tempfile.mkdtemp(prefix="relevance_ray-metrics-")
        cleanup.callback(shutil.rmtree, metrics_folder, ignore_errors=True)
        handlers = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
        cleanup.callback(_handle_signals, handlers)
        # As many again as the replicas take, for those of a model that is rolled out.
        cleanup.enter_context(
            ray_session(max(os.cpu_count() or 1, 2 * options.num_replicas * options.cpus_per_replica))
        )
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options={"host": host, "port": port}, logging_config=_QUIET)
        cleanup.callback(_stop_serve)
        # A second, impatient Ctrl-C must not cut the shutdown short: it would leave Ray's processes behind.
        cleanup.callback(_handle_signals, dict.fromkeys(_STOP_SIGNALS, signal.SIG_IGN))
        server = Server(f"http://{_reachable(host)}:{port}", model_folder, options, metrics_folder)
        server.start()
        yield server


def serve_model(
    model_folder: StrPath,
    host: str = "127.0.0.1",
    port: int = 8000,
    options: ServeOptions | None = None,
    newest: Callable[[], StrPath] | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM, then stop cleanly. Errors as `running_server`.

    On SIGHUP the model folder is read again, or the one that `newest` gives, and takes over without a pause; where it
    cannot be loaded, the reason is printed and the old one goes on.
    """
    newest = newest or (lambda: model_folder)
    asked_again: queue.SimpleQueue[None] = queue.SimpleQueue()  # safe to fill from a signal's handler, unlike an Event
    previous = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, _interrupt),
        signal.SIGHUP: signal.signal(signal.SIGHUP, lambda *_: asked_again.put(None)),
    }
    try:
        with running_server(model_folder, host, port, options) as server:
            told = f"Serving {model_folder} at {server.url}; POST {server.url}/score, docs at {server.url}/docs; "
            print(f"{told}Ctrl-C stops.", flush=True)
            while True:
                asked_again.get()
                while not asked_again.empty():  # asked several times meanwhile: once is enough
                    asked_again.get()
                try:
                    server.roll_out(newest())
                except UserError as error:
                    print(f"The model stays as it is: {error}", flush=True)
                except RuntimeError:  # of Ray Serve; the replicas that run still answer
                    traceback.print_exc()
                    print("The model stays as it is: Ray Serve failed, as said above.", flush=True)
                else:
                    print(f"Serving {server.model_folder} now.", flush=True)
    except KeyboardInterrupt:
        print("Stopped.", flush=True)
    finally:
        _handle_signals(previous)


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
