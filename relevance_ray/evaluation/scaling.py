"""The scaling curve: how a student gains with the pairs that teach it, and when it passes its teacher.

Walmart (arXiv 2505.07105) finds the student's quality rising with the generated set until it passes the teacher. Here that
is a law with an interval: the mean nDCG of students taught by n pairs is fitted by `ceiling - scale * n ** -exponent`
(the form of neural scaling laws, Hestness et al., arXiv 1712.00409), over and over on resampled queries, and where the law
meets the teacher's nDCG is the forecast. A law fitted over a factor of 16 says little beyond 16 times more, so a forecast
further away than that is not given as a number.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from relevance_ray.evaluation.significance import percentile_interval, resample_counts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_RESAMPLES = 1000
REACH = 16
"""A forecast goes no further than so many times the most pairs measured."""
_FLAT = "No gain with more pairs was measured."
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_EXPONENTS = np.geomspace(0.05, 2.0, 60)


@dataclass(frozen=True)
class PowerLaw:
    """nDCG of a student taught by n pairs: `ceiling - scale * n ** -exponent`, with a ceiling of at most 1."""

    ceiling: float
    scale: float
    exponent: float

    def at(self, num_pairs: float | np.ndarray) -> Any:
        return self.ceiling - self.scale * np.asarray(num_pairs, dtype=np.float64) ** -self.exponent

    def pairs_for(self, value: float) -> float:
        """How many pairs bring a student to `value`; infinite where no number does."""
        if value >= self.ceiling or self.scale <= 0:
            return 0.0 if self.scale <= 0 and value < self.ceiling else float("inf")
        return float((self.scale / (self.ceiling - value)) ** (1 / self.exponent))


def fit_power_law(num_pairs: Sequence[int], values: Sequence[float] | np.ndarray) -> PowerLaw:
    """The least-squares law through values [m] measured at some numbers of pairs [m], m of at least 3.

    The exponent is searched on a grid, ceiling and scale follow in closed form; a scale below 0 (a student that loses with
    more pairs) becomes 0, a ceiling above 1 becomes 1.
    """
    n, y = np.asarray(num_pairs, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(n) < 3 or len(n) != len(y):
        raise ValueError(f"a law needs at least 3 sizes, each with a value; got {len(n)} and {len(y)}")
    best, least = PowerLaw(float(y.mean()), 0.0, 1.0), float(((y - y.mean()) ** 2).sum())
    for exponent in _EXPONENTS:
        x = n**-exponent
        centred = x - x.mean()
        scale = -float((centred * y).sum() / (centred**2).sum())
        ceiling = float(y.mean() + scale * x.mean())
        if ceiling > 1.0:
            ceiling = 1.0
            scale = float((x * (1.0 - y)).sum() / (x**2).sum())
        if scale <= 0:
            continue
        error = float(((ceiling - scale * x - y) ** 2).sum())
        if error < least * (1 - 1e-9):
            best, least = PowerLaw(ceiling, scale, float(exponent)), error
    return best


def scaling_report(
    by_size: Mapping[int, np.ndarray],
    baselines: Mapping[str, np.ndarray],
    teacher: str = "teacher",
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a curve, fit it, forecast.

    Args:
        by_size: number of pairs -> nDCG of each query, float64 [seeds, q], NaN where a query has no relevant product.
        baselines: name -> the same of models that no number of pairs changes, float64 [q] or [seeds, q]; the teacher
            among them.
        teacher: the name of the one to pass.

    Returns:
        `sizes` (of each: pairs, ndcg, by_seed, interval, and differences with intervals to the teacher and to the size
        before it), `baselines`, `law` (None for fewer than three sizes), and `forecast`: `pairs` (None beyond `REACH`),
        `low` and `high` of its 95% interval (None: beyond), `reached` the share of resamples in which it is within reach,
        and a `sentence`. Intervals are of resampled queries; students' seeds are averaged.
    """
    sizes = sorted(by_size)
    curve = np.stack([np.asarray(by_size[size], dtype=np.float64).mean(axis=0) for size in sizes])
    lines = {
        name: np.atleast_2d(np.asarray(values, dtype=np.float64)).mean(axis=0) for name, values in baselines.items()
    }
    defined = ~np.isnan(np.stack([*curve, *lines.values()])).any(axis=0)
    num_queries = int(defined.sum())
    if not num_queries:
        raise ValueError("no query has a relevant product, so there is no nDCG")
    draws = resample_counts(num_queries, num_resamples, seed) / num_queries
    curve, goal = curve[:, defined], lines[teacher][defined]
    curve_draws, goal_draws = draws @ curve.T, draws @ goal
    rows = []
    for index, size in enumerate(sizes):
        row = {
            "pairs": size,
            "ndcg": float(curve[index].mean()),
            "by_seed": [float(values[defined].mean()) for values in np.atleast_2d(by_size[size])],
            "interval": list(percentile_interval(curve_draws[:, index])),
            "to_teacher": _difference(curve[index], goal, draws),
        }
        if index:
            row["to_size_before"] = _difference(curve[index], curve[index - 1], draws)
        rows.append(row)
    report: dict[str, Any] = {
        "queries": num_queries,
        "sizes": rows,
        "teacher": teacher,
        "baselines": {
            name: {
                "ndcg": float(values[defined].mean()),
                "interval": list(percentile_interval(draws @ values[defined])),
                **({} if name == teacher else {"to_teacher": _difference(values[defined], goal, draws)}),
            }
            for name, values in lines.items()
        },
        "law": None,
        "forecast": None,
    }
    if len(sizes) >= 3:
        law = fit_power_law(sizes, curve.mean(axis=1))
        laws = [fit_power_law(sizes, values) for values in curve_draws]
        report["law"] = {"ceiling": law.ceiling, "scale": law.scale, "exponent": law.exponent}
        report["law"]["ceiling_interval"] = list(percentile_interval(np.asarray([each.ceiling for each in laws])))
        crossings = np.asarray([each.pairs_for(value) for each, value in zip(laws, goal_draws, strict=True)])
        report["forecast"] = _forecast(law.pairs_for(float(goal.mean())), crossings, sizes)
    return report


def _difference(own: np.ndarray, other: np.ndarray, draws: np.ndarray) -> dict[str, float]:
    low, high = percentile_interval(draws @ (own - other))
    return {"value": float((own - other).mean()), "low": low, "high": high}


def _forecast(pairs: float, crossings: np.ndarray, sizes: Sequence[int]) -> dict[str, Any]:
    reach = float(REACH * sizes[-1])
    low, high = np.quantile(crossings, [0.025, 0.975], method="inverted_cdf")
    least = float(sizes[0])
    within = [None if value > reach else round(max(value, least)) for value in (pairs, float(low), float(high))]
    share = float((crossings <= reach).mean())
    if within[0] is None:
        sentence = (
            f"by this curve the student does not pass its teacher within {reach:,.0f} pairs ({REACH} times the most that "
            f"were measured); in {share:.0%} of resamples it does"
        )
    elif pairs <= least:
        sentence = f"the student is past its teacher with the fewest pairs that were measured, {sizes[0]:,}"
    else:
        bounds = " to ".join("beyond" if value is None else f"{value:,}" for value in within[1:])
        when = "passes" if within[0] > sizes[-1] else "has passed"
        sentence = f"by this curve the student {when} its teacher at {within[0]:,} pairs (95% interval {bounds})"
    return {"pairs": within[0], "low": within[1], "high": within[2], "reached": share, "sentence": sentence}


def scaling_markdown(report: Mapping[str, Any]) -> str:
    """The curve as a table, and what it forecasts."""
    lines = [
        "| taught by | nDCG | 95% interval | to the teacher | to the size before |",
        "|---|---|---|---|---|",
    ]
    for name, found in report["baselines"].items():
        lines.append(
            f"| {name} | {found['ndcg']:.4f} | {_span(found['interval'])} | {_signed(found.get('to_teacher'))} | |"
        )
    for row in report["sizes"]:
        cells = [f"{row['pairs']:,} pairs", f"{row['ndcg']:.4f}", _span(row["interval"])]
        lines.append(f"| {' | '.join([*cells, _signed(row['to_teacher']), _signed(row.get('to_size_before'))])} |")
    if report["law"]:
        law = report["law"]
        low, high = law["ceiling_interval"]
        formula = f"nDCG = {law['ceiling']:.4f} - {law['scale']:.4g} * pairs^-{law['exponent']:.3f}"
        fitted = f"Fitted law: {formula} (ceiling {low:.4f} to {high:.4f})." if law["scale"] else _FLAT
        lines += ["", f"{fitted} {sentence_of(report['forecast'])}"]
    return "\n".join(lines) + "\n"


def scaling_plot(report: Mapping[str, Any]) -> bytes:
    """A PNG of `draw_scaling`."""
    buffer = io.BytesIO()
    draw_scaling(report).savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def draw_scaling(report: Mapping[str, Any]) -> Figure:
    """nDCG over the number of pairs, the fitted law, and the models that no number of pairs changes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    pairs = np.asarray([row["pairs"] for row in report["sizes"]], dtype=np.float64)
    values = np.asarray([row["ndcg"] for row in report["sizes"]])
    spans = np.asarray([row["interval"] for row in report["sizes"]])
    axes.errorbar(pairs, values, np.abs(spans.T - values), fmt="o", color=_COLORS[0], capsize=3, label="student")
    for row in report["sizes"]:
        axes.plot([row["pairs"]] * len(row["by_seed"]), row["by_seed"], ".", color=_COLORS[0], alpha=0.4)
    if report["law"]:
        law = PowerLaw(*(report["law"][name] for name in ("ceiling", "scale", "exponent")))
        x = np.geomspace(pairs[0], pairs[-1] * REACH, 200)
        axes.plot(x, law.at(x), "--", color=_COLORS[0], label="fitted law")
    for color, (name, found) in zip(_COLORS[1:] * 9, report["baselines"].items(), strict=False):
        axes.axhline(found["ndcg"], color=color, linewidth=2 if name == report["teacher"] else 1, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("labeled pairs")
    axes.set_ylabel("nDCG")
    axes.legend(fontsize=8)
    return figure


def sentence_of(forecast: Mapping[str, Any]) -> str:
    """The forecast in words."""
    text = str(forecast["sentence"])
    return text[0].upper() + text[1:] + "."


def _span(interval: Sequence[float]) -> str:
    return f"{interval[0]:.4f} to {interval[1]:.4f}"


def _signed(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
