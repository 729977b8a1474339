"""The one data-parallel loop, in plain torch.distributed.

It runs in one process, under `torchrun`, and inside Ray Train's workers without knowing which. Three promises shape it:

- The batch of a step is a pure function of (seed, epoch, step), and the loss is averaged over the *global* batch, so the
  number of workers changes speed and nothing else (beyond the rounding of a sum's order, and the dropout masks).
- Dropout is seeded from (seed, step, rank), so a resumed run takes the very steps the undisturbed one would have taken.
- Workers share a batch by its tokens, not by its examples: the slowest one sets the pace.

The trade-off: every worker holds the whole model and its optimizer, and gradients are summed in one flat buffer after the
backward pass instead of during it. That is simple, exact with micro-batches, and right for students and for teachers up
to what one GPU trains; larger ones train by LoRA, which shrinks the buffer to the adapters, or shared out over the workers
(`placement.py`).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from relevance_ray import distributed
from relevance_ray.errors import UserError
from relevance_ray.storage import join, read_bytes, read_json
from relevance_ray.training import checkpoint
from relevance_ray.training.checkpoint import LoopState
from relevance_ray.training.options import FitOptions
from relevance_ray.training.placement import place
from relevance_ray.training.work_folder import WorkFolder

OnProgress = Callable[[dict[str, Any]], None]
LOG_FILE, RESULT_FILE, MODEL_FOLDER, PREDICTIONS_FILE = "log.jsonl", "result.json", "model", "predictions.npy"
MAIN_METRIC = "ndcg"
_TIE = 1e-9
"""A mean of one ranking differs by less when its scores moved in their last bits: a tie, for the earlier step to win."""


class Task(Protocol):
    """What the loop trains.

    Attributes:
        model: the module whose parameters with `requires_grad` are trained.
        costs: int64 [num_examples], tokens of each example.
        num_pairs: int64 [num_examples], (query, product) pairs of each example.
    """

    model: nn.Module
    costs: np.ndarray
    num_pairs: np.ndarray

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of the examples in one epoch, int64 [num_examples]: a pure function of its arguments."""

    def compile(self) -> None:
        """Train through `torch.compile` from now on."""

    def begin(self, examples: np.ndarray) -> None:
        """Told all examples of this worker in a step before their losses are asked for; collective."""

    def loss(self, examples: np.ndarray) -> torch.Tensor:
        """The summed (not averaged) loss of some examples, as a scalar in the graph."""

    def evaluate(self) -> dict[str, float]:
        """Metrics on the dev queries, `ndcg` among them, the same on every worker; collective."""

    def predict(self) -> np.ndarray:
        """float32 [n, K] class logits of the rows asked for, the same on every worker; collective."""

    def save(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write the model of some trained weights as a plain `save_pretrained` folder."""


class TaskSpec(Protocol):
    """A picklable description of a task (paths and options, no data), built anew in each worker."""

    def build(self, rank: int, world_size: int) -> Task: ...


@dataclass(frozen=True)
class FitResult:
    """What the loop leaves in its work folder.

    Attributes:
        steps: optimizer steps.
        best_step: the step whose weights were kept.
        metrics: dev metrics of the kept weights.
        pairs: pairs trained on, repeats counted.
        seconds: time spent in training steps, evaluation left out.
        work_dir: holds `model/` (plain folder, where it was to be kept), `predictions.npy` and `log.jsonl`; local or s3://.
    """

    steps: int
    best_step: int
    metrics: dict[str, float]
    pairs: int
    seconds: float
    work_dir: str

    @property
    def pairs_per_second(self) -> float:
        return self.pairs / self.seconds if self.seconds else 0.0

    @property
    def model_folder(self) -> str:
        return join(self.work_dir, MODEL_FOLDER)

    def predictions(self) -> np.ndarray:
        """float32 [n, K]: `Task.predict` of the kept weights."""
        return np.load(io.BytesIO(read_bytes(join(self.work_dir, PREDICTIONS_FILE))))


def read_result(work_dir: str | Path) -> FitResult | None:
    """The result of a loop that ended, else None."""
    try:
        found = read_json(join(str(work_dir), RESULT_FILE))
    except FileNotFoundError:
        return None
    return FitResult(**{**found, "work_dir": str(work_dir)})


def fit(
    task: Task,
    options: FitOptions,
    work_dir: str | Path,
    on_progress: OnProgress | None = None,
    keep_model: bool = True,
) -> FitResult:
    """Train a task; called by every worker with the same arguments.

    Args:
        task: its model is trained in place.
        options: the loop's options.
        work_dir: where checkpoints, log and result go, local or s3://; only worker 0 reads and writes there. A run killed
            at any moment continues from its last checkpoint when called again, and one that ended returns at once.
        on_progress: called on worker 0 with each line of the log.
        keep_model: write the model, or only its predictions.

    Returns:
        The result; `work_dir/result.json` is written after everything else.

    Raises:
        UserError: the loss stopped being finite, or a GPU has too little memory.
    """
    finished = distributed.broadcast_object(read_result(work_dir) if distributed.rank() == 0 else None)
    if finished is not None:
        return finished
    try:
        loop = _Loop(task, options, WorkFolder(work_dir), on_progress)
        loop.run()
        return loop.finish(keep_model)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"a GPU ran out of memory ({str(error).splitlines()[0]}); lower fit.max_batch_tokens, or share a teacher out "
            "over the workers (fit.sharded)"
        ) from error


class _Loop:
    def __init__(self, task: Task, options: FitOptions, folder: WorkFolder, on_progress: OnProgress | None) -> None:
        self.task, self.options, self.folder, self.on_progress = task, options, folder, on_progress
        self.work_dir = folder.local  # worker 0's alone
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.device = training_device()
        self.placed = place(task.model, self.device, options)
        self.model = self.placed.model
        if options.compiled:
            task.compile()
        self.num_examples = len(task.costs)
        assert self.num_examples > 0
        self.steps_per_epoch = math.ceil(self.num_examples / options.batch_size)
        self.num_steps = self.steps_per_epoch * options.epochs
        self.eval_every = options.eval_every or self.steps_per_epoch
        self.checkpoints = self.work_dir / "checkpoints"
        self.state = LoopState()
        self._resume()

    def _resume(self) -> None:
        """Go on from the latest checkpoint, which worker 0 has, where there is one."""
        found = None
        if self.rank == 0:
            self.folder.open()
            found = checkpoint.load_checkpoint(self.checkpoints)
        weights, optimizer, state = found or ({}, {}, None)
        if (state := distributed.broadcast_object(state)) is not None:
            self.state = state
            self.placed.load_optimizer_state(optimizer)
            self.placed.load_weights(weights)

    def run(self) -> None:
        self._open_log()
        order, order_epoch = np.empty(0, dtype=np.int64), -1
        for step in range(self.state.step, self.num_steps if not self.state.ended else 0):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self.task.order(self.options.seed, epoch), epoch
            size = self.options.batch_size
            self._step(step, epoch, order[place * size : (place + 1) * size])
            last = step + 1 == self.num_steps
            if (step + 1) % self.eval_every == 0 or last:
                self._evaluate()
                last = self.state.ended = last or self._patience_is_over()
            if (step + 1) % self.options.checkpoint_every == 0 or last:
                self._checkpoint()
            if last:
                break

    def finish(self, keep_model: bool) -> FitResult:
        """Put the best weights back, predict, and write model (if wanted), predictions and result, in this order."""
        weights = checkpoint.load_file(self._best_file()) if self.rank == 0 else {}
        self.placed.load_weights(weights)
        self.model.eval()
        predictions = self.task.predict()
        state = self.state
        result = FitResult(
            state.step, state.best_step, state.best_metrics, state.pairs, round(state.seconds, 3), self.folder.path
        )
        if self.rank == 0:
            partial, final = self.work_dir / f".{MODEL_FOLDER}", self.work_dir / MODEL_FOLDER
            for folder in (partial, final):
                shutil.rmtree(folder, ignore_errors=True)
            if keep_model:
                self.task.save(partial, weights)
                partial.rename(final)
            np.save(self.work_dir / PREDICTIONS_FILE, predictions)
            _write_json(self.work_dir / RESULT_FILE, asdict(result))
            shutil.rmtree(self.checkpoints)
            self._best_file().unlink()
            self.folder.save()
        distributed.barrier()
        return result

    def _step(self, step: int, epoch: int, batch: np.ndarray) -> None:
        start = time.perf_counter()
        self.model.train()
        seed = np.random.SeedSequence([self.options.seed, step, self.rank]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed))
        mine = share_by_cost(batch, self.task.costs[batch], self.world)[self.rank]
        self.placed.begin_step()
        total = torch.zeros((), device=self.device)
        with self._autocast():
            self.task.begin(mine)
        own = micro_batches(mine, self.task.costs[mine], self.options.max_batch_tokens)
        empty = [batch[:1]] * (self.placed.num_micro_batches(len(own)) - len(own))
        for number, micro_batch in enumerate([*own, *empty]):
            with self._autocast():
                loss = self.task.loss(micro_batch) * (number < len(own)) / len(batch)
            loss.backward()
            total += loss.detach()
        mean_loss = float(distributed.all_reduce_sum(total))
        if not math.isfinite(mean_loss):
            raise UserError(f"the loss became {mean_loss} at step {step + 1}; lower fit.learning_rate")
        norm = self.placed.end_step(self.options.max_grad_norm)
        rate = self.options.learning_rate * schedule(step, self.num_steps, self.options.warmup_ratio)
        for group in self.placed.optimizer.param_groups:
            group["lr"] = rate
        self.placed.optimizer.step()
        seconds = time.perf_counter() - start
        pairs = int(self.task.num_pairs[batch].sum())
        self.state.step, self.state.pairs = step + 1, self.state.pairs + pairs
        self.state.seconds += seconds
        self._log(
            {
                "step": step + 1,
                "steps": self.num_steps,
                "epoch": epoch + 1,
                "loss": mean_loss,
                "grad_norm": norm,
                "learning_rate": rate,
                "pairs": self.state.pairs,
                "pairs_per_second": pairs / seconds,
                "groups_per_second": len(batch) / seconds,
            }
        )

    def _evaluate(self) -> None:
        """Measure, and keep these weights where they are the best so far (the earliest of equals)."""
        self.model.eval()
        with self._autocast():
            metrics = self.task.evaluate()
        best = self.state.best_metrics.get(MAIN_METRIC, -math.inf)
        if self.state.best_step < 0 or metrics[MAIN_METRIC] > best + _TIE:
            self.state.best_step, self.state.best_metrics = self.state.step, metrics
            weights = self.placed.weights()
            if self.rank == 0:
                checkpoint.save_file(self._best_file(), weights)
        self._log({"step": self.state.step, "steps": self.num_steps, "dev": metrics})

    def _patience_is_over(self) -> bool:
        waited = (self.state.step - self.state.best_step) // self.eval_every
        return bool(self.options.patience) and waited >= self.options.patience

    def _checkpoint(self) -> None:
        weights, optimizer = self.placed.weights(), self.placed.optimizer_state()
        if self.rank == 0:
            checkpoint.save_checkpoint(self.checkpoints, weights, optimizer, self.state)
            # Only now is no checkpoint left to resume from that would want an older best.
            for file in set(self.work_dir.glob("best-*.pt")) - {self._best_file()}:
                file.unlink()
            self.folder.save()
        # Nobody runs ahead of a checkpoint: after a kill, all ranks load the same one.
        distributed.barrier()

    def _best_file(self) -> Path:
        return self.work_dir / f"best-{self.state.best_step:010d}.pt"

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        chosen = self.options.precision
        low = chosen == "bfloat16" or (chosen == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16) if low else contextlib.nullcontext()

    def _open_log(self) -> None:
        """Forget lines of steps that a kill undid, so that the log has each step once."""
        path = self.work_dir / LOG_FILE
        if self.rank == 0 and path.is_file():
            complete = [line for line in path.read_text(encoding="utf-8").split("\n") if line.endswith("}")]
            kept = [line for line in complete if json.loads(line)["step"] <= self.state.step]
            path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def _log(self, record: dict[str, Any]) -> None:
        if self.rank != 0:
            return
        with open(self.work_dir / LOG_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.on_progress is not None:
            self.on_progress(record)


def training_device() -> torch.device:
    """The GPU that was made current for this worker, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def share_by_cost(examples: np.ndarray, costs: np.ndarray, num_workers: int) -> list[np.ndarray]:
    """Deal examples to workers so that their costs are nearly equal: the costliest first, each to the lightest worker."""
    load = [0] * num_workers
    shares: list[list[int]] = [[] for _ in range(num_workers)]
    for index in np.argsort(-costs, kind="stable"):
        worker = load.index(min(load))
        load[worker] += int(costs[index])
        shares[worker].append(int(examples[index]))
    return [np.asarray(share, dtype=np.int64) for share in shares]


def micro_batches(examples: np.ndarray, costs: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Cut examples, in order, into runs of at most `max_tokens` (one example that is larger is a run of its own)."""
    runs: list[list[int]] = []
    tokens = 0
    for example, cost in zip(examples.tolist(), costs.tolist(), strict=True):
        if not runs or tokens + cost > max_tokens:
            runs.append([])
            tokens = 0
        runs[-1].append(example)
        tokens += cost
    return [np.asarray(run, dtype=np.int64) for run in runs]


def schedule(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at a step (from 0): linear up over the warmup, then linear down to 0."""
    warmup = round(num_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (num_steps - step) / max(num_steps - warmup, 1)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(value), encoding="utf-8")
    os.replace(partial, path)
