"""Which runtime scores a student fastest without changing how it ranks: measured on judged pairs, here.

A faster runtime computes the same model otherwise (int8 most of all), so each is held against torch on the same pairs,
and refused where it ranks them worse, in another order, or where a score depends on the products beside it.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relevance_ray.calibration import logit_of_classes
from relevance_ray.engines.encoding import EncodedTexts, token_batches
from relevance_ray.engines.forward import Forward
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.engines.runtimes import RUNTIMES, TORCH, first_line, open_graph
from relevance_ray.engines.token_model import PairInputs, TokenModel
from relevance_ray.errors import UserError
from relevance_ray.evaluation.judged import JudgedPairs
from relevance_ray.evaluation.significance import MIN_QUERIES, percentile_interval, resample_counts
from relevance_ray.metrics import Ranking, ndcg
from relevance_ray.student.export import GRAPHS, export_float32

MAX_NDCG_LOSS = 0.002
MIN_TAU = 0.95
MAX_NEIGHBOURS = 0.05
"""By how much a logit may change with the products scored beside it, in standard deviations of the logits."""
TIMED_PAIRS, CALIBRATION_PAIRS, COMPANY = 400, 200, 64
ROUNDS = 5
_FLOAT32 = "float32.onnx"
_RESAMPLES = 1000
_DIGITS = 4
"""Of a logit, where orders are compared: products with the same text tie, whatever the last bits say."""


@dataclass(frozen=True)
class RuntimeFigures:
    """What a runtime does with a model on this machine.

    Attributes:
        name: of `RUNTIMES`.
        pairs_per_second: (of a two-tower: texts) median of rounds that alternate between all runtimes; without tokenising.
        ndcg: mean over the judged queries.
        ndcg_loss, low, high: torch's nDCG minus its own, with a 95% paired bootstrap interval (NaN for few queries).
        tau: mean over queries of Kendall's tau-b between its order and torch's.
        neighbours: the most that a logit changes with the products beside it, in standard deviations of the logits.
        refused: why `auto` does not take it, else None.
    """

    name: str
    pairs_per_second: float
    ndcg: float
    ndcg_loss: float
    low: float
    high: float
    tau: float
    neighbours: float
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; None for undefined."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


class MeasuredRuntimes:
    """Runtimes of one model folder, exported into a folder and measured beside torch.

    Args:
        folder: a model folder that torch runs.
        judged: pairs to measure on.
        known: pairs whose activations set the scales of static graphs.
        num_threads: CPU threads of each.
        graphs: folder for the graphs.
        names: runtimes to measure; torch always is, and those whose library is missing are not.
        on_progress: called after each that is exported.

    Attributes:
        figures: of each, torch first.
        failed: runtimes that could not be made or run, and why.

    Raises:
        UserError: the model can read none of the products.
    """

    def __init__(
        self,
        folder: Path,
        judged: JudgedPairs,
        known: JudgedPairs,
        num_threads: int,
        graphs: Path,
        names: Sequence[str] = tuple(RUNTIMES),
        on_progress: Callable[[], object] = lambda: None,
    ) -> None:
        self.folder, self.graphs, self.failed = folder, graphs, {}  # type: Path, Path, dict[str, str]
        model = load_pair_model(folder, device="cpu", num_threads=num_threads)
        assert isinstance(model, TokenModel)
        self._model, self._judged = model, judged
        self._pairs = self._tokenised(judged)
        logits = {TORCH: self._logits(model.forward)}
        if np.isneginf(logits[TORCH]).all():
            raise UserError(f"{folder} finds no text in any judged product; nothing can be measured")
        self._sample = self._some_texts(self._pairs[1], TIMED_PAIRS)
        forwards: dict[str, Forward] = {TORCH: model.forward}
        on_progress()
        calibration = self._batches(self._some_texts(self._tokenised(known)[1], CALIBRATION_PAIRS))
        others = [each for each in names if each != TORCH]
        try:
            if others:
                export_float32(folder, self.graphs / _FLOAT32)
        except Exception as error:  # noqa: BLE001 - torch's own, of a model that it cannot turn into a graph; it is told
            self.failed, others = dict.fromkeys(others, f"no graph can be made of it: {first_line(error)}"), []
        for name in others:
            try:
                forwards[name] = self._opened(name, calibration, num_threads)
            except Exception as error:  # noqa: BLE001 - a library's own, of a model it cannot run; it is told
                self.failed[name] = first_line(error)
            on_progress()
        rates = self._rates(forwards)
        logits |= {name: self._logits(forward) for name, forward in forwards.items() if name != TORCH}
        self.figures = [self._figures(name, rates[name], logits, forwards[name]) for name in forwards]

    def fastest(self) -> RuntimeFigures:
        """The fastest that is not refused."""
        return max((each for each in self.figures if each.refused is None), key=lambda each: each.pairs_per_second)

    def graph_of(self, name: str) -> Path:
        """The graph of a measured runtime, other than torch."""
        return self.graphs / f"{RUNTIMES[name].graph}.onnx"

    def _opened(self, name: str, calibration: Sequence[dict[str, np.ndarray]], num_threads: int) -> Forward:
        """A runtime that has run once."""
        if importlib.util.find_spec(RUNTIMES[name].library) is None:
            raise ModuleNotFoundError(f"{RUNTIMES[name].library} is not installed")
        forward = open_graph(name, self._graph(RUNTIMES[name].graph, calibration), num_threads)
        forward(self._sample.pad([0]))
        return forward

    def _graph(self, graph: str, calibration: Sequence[dict[str, np.ndarray]]) -> Path:
        out = self.graphs / f"{graph}.onnx"
        if not out.exists():
            with tempfile.TemporaryDirectory(dir=self.graphs) as scratch:
                GRAPHS[graph](self.graphs / _FLOAT32, Path(scratch) / out.name, calibration)
                (Path(scratch) / out.name).rename(out)
        return out

    def _tokenised(self, judged: JudgedPairs) -> tuple[PairInputs[Any], EncodedTexts]:
        inputs = self._model.inputs(judged.queries, [self._model.render(product) for product in judged.products])
        return inputs, self._model.tokenize(inputs.distinct)

    def _some_texts(self, texts: EncodedTexts, number: int) -> EncodedTexts:
        """Inputs from all over, that can be read."""
        usable = np.flatnonzero(texts.lengths)
        if not len(usable):
            raise UserError(
                f"no judged product has text in the fields that {self.folder} reads; nothing can be measured"
            )
        return texts.take(usable[np.linspace(0, len(usable) - 1, min(number, len(usable)), dtype=np.int64)])

    def _batches(self, texts: EncodedTexts) -> list[dict[str, np.ndarray]]:
        return [texts.pad(rows) for rows in token_batches(texts.lengths, self._model.max_batch_tokens)]

    def _logits(self, forward: Forward) -> np.ndarray:
        """float64 [n] of all judged pairs; -inf where one cannot be scored."""
        inputs, texts = self._pairs
        self._model.forward = forward
        logit = logit_of_classes(self._model.finish(inputs, self._model.run(texts)), self._model.gains)
        return np.where(np.isnan(logit), -np.inf, logit.astype(np.float64))

    def _rates(self, forwards: dict[str, Forward]) -> dict[str, float]:
        seconds: dict[str, list[float]] = {name: [] for name in forwards}
        for _ in range(ROUNDS):
            for name, forward in forwards.items():
                self._model.forward = forward
                start = time.perf_counter()
                self._model.run(self._sample)
                seconds[name].append(time.perf_counter() - start)
        return {name: len(self._sample.input_ids) / float(np.median(found)) for name, found in seconds.items()}

    def _neighbours(self, forward: Forward) -> float:
        """The most that a logit changes where its texts are run alone instead of in company, in standard deviations of the
        logits."""
        self._model.forward = forward
        rows = np.linspace(0, self._judged.num_pairs - 1, min(COMPANY, self._judged.num_pairs), dtype=np.int64)
        inputs = self._model.inputs(
            [self._judged.queries[row] for row in rows],
            [self._model.render(self._judged.products[row]) for row in rows],
        )
        texts = self._model.tokenize(inputs.distinct)
        together = self._model.run(texts)
        alone = np.concatenate([self._model.run(texts.take([place])) for place in range(len(inputs.distinct))])
        first, second = (
            logit_of_classes(self._model.finish(inputs, each), self._model.gains) for each in (together, alone)
        )
        spread = float(np.nanstd(first))
        return float(np.nanmax(np.abs(first - second))) / spread if spread else math.nan

    def _figures(self, name: str, rate: float, logits: dict[str, np.ndarray], forward: Forward) -> RuntimeFigures:
        pairs = self._judged
        own, torchs = (ndcg(pairs.gains, logits[each], pairs.offsets) for each in (name, TORCH))
        loss = (torchs - own)[~np.isnan(own)]
        low = high = math.nan
        if len(loss) >= MIN_QUERIES:
            low, high = percentile_interval(resample_counts(len(loss), _RESAMPLES, 0) @ loss / len(loss))
        taus = Ranking(logits[name].round(_DIGITS), pairs.offsets).concordance(logits[TORCH].round(_DIGITS))[1]
        tau = float(np.nanmean(taus)) if not np.isnan(taus).all() else 1.0
        found = RuntimeFigures(
            name, rate, float(np.nanmean(own)), float(loss.mean()), low, high, tau, self._neighbours(forward)
        )
        return found if name == TORCH else RuntimeFigures(**{**asdict(found), "refused": _why_refused(found)})


def _why_refused(found: RuntimeFigures) -> str | None:
    if not found.ndcg_loss <= MAX_NDCG_LOSS:
        return f"it loses {found.ndcg_loss:.4f} of nDCG (allowed: {MAX_NDCG_LOSS})"
    if not found.tau >= MIN_TAU:
        return f"its order has Kendall's tau {found.tau:.3f} to torch's (at least {MIN_TAU})"
    if not found.neighbours <= MAX_NEIGHBOURS:
        return f"a logit changes by up to {found.neighbours:.0%} of their spread with the products beside it"
    return None


def runtimes_text(measured: MeasuredRuntimes) -> str:
    """The figures as a table, torch's speed as 1."""
    base = measured.figures[0].pairs_per_second
    lines = [f"{'runtime':26} {'pairs/s':>8} {'torch=1':>8} {'nDCG lost':>10} {'95% interval':>18} {'tau':>6}"]
    for each in measured.figures:
        interval = "few queries" if math.isnan(each.low) else f"{each.low:+.4f} {each.high:+.4f}"
        lines.append(
            f"{each.name:26} {each.pairs_per_second:8.1f} {each.pairs_per_second / base:8.2f} {each.ndcg_loss:+10.4f} "
            f"{interval:>18} {each.tau:6.3f}{'' if each.refused is None else f'  refused: {each.refused}'}"
        )
    lines += [f"{name:26} not measured: {why}" for name, why in measured.failed.items()]
    return "\n".join(lines)
