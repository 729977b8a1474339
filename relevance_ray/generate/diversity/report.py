"""The diversity report: `diversity.json` for programs, `diversity.md` and pictures for people, groups to read for both."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from relevance_ray import storage
from relevance_ray.generate.diversity.query_figures import SHOWN_VIEWS
from relevance_ray.generate.diversity.query_text import TYPES
from relevance_ray.schema import LabelScale

PICTURES = {
    "lengths.png": "Query length against the log",
    "types.png": "Types of queries against the log",
    "categories.png": "Categories of the candidates and of the catalog",
    "origins.png": "Where candidates come from",
    "grades.png": "The teacher's grades",
}
"""The report's pictures, file name -> title."""


def write_diversity(report: Mapping[str, Any], out_dir: str, *, about: Mapping[str, str] | None = None) -> str:
    """Write `diversity.json`, `diversity.md` and its pictures into a folder, local or s3://; the Markdown's path.

    Args:
        report: what `Diversity.report` gives.
        about: what was read, shown as a list; also kept in the JSON.
    """
    from relevance_ray.generate.diversity.plots import plots  # matplotlib takes half a second to import

    drawn = plots(report)
    storage.write_json(storage.join(out_dir, "diversity.json"), {"about": dict(about or {}), **report})
    for name in PICTURES:
        if name in drawn:
            storage.write_bytes(storage.join(out_dir, name), drawn[name])
        else:
            storage.remove_file(storage.join(out_dir, name))
    markdown = storage.join(out_dir, "diversity.md")
    storage.write_bytes(markdown, render_markdown(report, about=about or {}, pictures=list(drawn)).encode())
    return markdown


def warning_lines(report: Mapping[str, Any]) -> list[str]:
    """What to print of a report: its warnings, or that there are none, and what could not be checked."""
    lines = [f"warning: {sentence}" for sentence in report["warnings"]]
    if report["not_checked"]:
        lines.append(f"note: {report['not_checked']}")
    elif not lines:
        lines.append("no drift from the query log or the catalog's categories was found")
    return lines


def render_markdown(
    report: Mapping[str, Any], *, about: Mapping[str, str] | None = None, pictures: Sequence[str] = ()
) -> str:
    """The report as Markdown, warnings first."""
    lines = ["# Diversity of the generated pairs", "", *(f"- {line}" for line in warning_lines(report))]
    for name, sentences in report["source_warnings"].items():
        lines += [f"- of source {name} alone: {sentence}" for sentence in sentences]
    lines.append("")
    lines += [f"{report['groups']:,} groups (queries), {report['pairs']:,} pairs.", ""]
    lines += [*(f"- **{key}**: {value}" for key, value in (about or {}).items()), ""] if about else []
    lines += _queries(report, pictures) + _catalog(report, pictures) + _candidates(report, pictures)
    lines += _grades(report, pictures)
    lines += [
        "## How to read this",
        "",
        *(f"- **{name}**: {rule}." for name, rule in TYPES.items()),
        "- A warning says that a difference from the log exceeds that of random parts of the log by more than what a tenth "
        "of the queries, all of a kind foreign to the log, would make (for categories, a fifth).",
        "- Divergence is Jensen-Shannon's, in bits, from 0 (the same) to 1 (nothing in common). Distinct-n is the share of "
        "n-grams that are different ones (Li et al., 2016), of words or, in scripts without spaces, of character bigrams.",
        "- Distinct-n and near-duplicates depend on how many queries are read, so beside them stand those of as many "
        "queries of the log. Near-duplicates have the same words, or 80% of their character 3-grams in common.",
        '- "about" marks what is estimated from an even sample of names; everything else is counted over what was read.',
        "",
    ]
    return "\n".join(lines)


def _queries(report: Mapping[str, Any], pictures: Sequence[str]) -> list[str]:
    streams = report["queries"]
    if len(streams) == 2:
        streams = {"all": streams["all"]}
    views = {}
    if report["log"]["different"]:
        views = {f"log, {view}": report["log"]["views"][view] for view in SHOWN_VIEWS}
    blank = ["" for _ in views]
    rows = [["different queries", *(_about(s["different"], s["different_exact"]) for s in streams.values()), *blank]]
    if views:
        rows[0][-len(views)] = _about(report["log"]["different"], report["log"]["different_exact"])
    for unit in ("words", "chars"):
        for figure, form in (("mean", ".1f"), ("p95", ".0f")):
            found = [stream["length"][unit][figure] for stream in (*streams.values(), *views.values())]
            rows.append([f"{unit.replace('chars', 'characters')}, {figure}", *(format(value, form) for value in found)])
    for name in TYPES:
        found = [stream["types"][name] for stream in (*streams.values(), *views.values())]
        rows.append([f"type {name}", *(f"{value:.0%}" for value in found)])
    rows += [
        [f"distinct-{n}", *(_beside_log(stream, f"distinct_{n}") for stream in streams.values()), *blank]
        for n in (1, 2, 3)
    ]
    rows.append(["near-duplicates", *(_beside_log(stream, "near") for stream in streams.values()), *blank])
    rows.append(["repeated", *(f"{stream['repeated_share']:.1%}" for stream in streams.values()), *blank])
    if views:
        in_log = [(stream["against_log"] or {}).get("also_in_log") for stream in streams.values()]
        rows.append(["also in the log", *("-" if share is None else f"{share:.0%}" for share in in_log), *blank])
        for unit in ("words", "chars"):
            bits = [_least((stream["against_log"] or {}).get(f"length_{unit}_bits")) for stream in streams.values()]
            rows.append([f"length in {unit.replace('chars', 'characters')}, bits from the log", *bits, *blank])
    lines = ["## Queries", "", *_table(["", *streams, *views], rows)]
    return lines + _shown(pictures, "lengths.png", "types.png")


def _beside_log(stream: Mapping[str, Any], figure: str) -> str:
    """A figure that depends on the number of queries, with that of as many of the log."""
    against = stream["against_log"]
    if figure == "near":
        own, log = stream["near_duplicates"]["share"], None
        if against is not None:
            own, log = against["near_duplicates"], against["log_near_duplicates"]
        return f"{own:.1%}" if log is None else f"{own:.1%} (log {log:.1%})"
    if against is None:
        return f"{stream['distinct_n'][figure]:.3f}"
    return f"{against['distinct_n'][figure]:.3f} (log {against['log_distinct_n'][figure]:.3f})"


def _least(bits: Sequence[float | None] | None) -> str:
    found = [value for value in bits or [] if value is not None]
    return f"{min(found):.3f}" if found else "-"


def _catalog(report: Mapping[str, Any], pictures: Sequence[str]) -> list[str]:
    products = report["products"]
    lines = ["## Products, categories and brands", ""]
    if products["different"]:
        share = "" if products["catalog_share"] is None else f" ({products['catalog_share']:.1%} of the catalog)"
        lines += [
            f"{_about(products['different'], products['exact'])} different products{share}, each in "
            f"{products['mean_uses']:.1f} groups on average, half of them in {products['median_uses']:.0f} or fewer, at "
            f"most in {products['max_uses']:,}. The most used 1% of the products are in "
            f"{products['top_1_percent_share']:.1%} of the pairs.",
            "",
        ]
    named = {
        "top-level categories": report["categories"]["top"],
        "categories": report["categories"]["leaf"],
        "brands": report["brands"],
    }
    rows = [
        [
            name,
            _about(found["in_catalog"], found["exact"]),
            "-" if found["coverage"] is None else f"{found['coverage']:.1%}",
            "-" if found["coverage_of_products"] is None else f"{found['coverage_of_products']:.1%}",
            "-" if found["divergence_bits"] is None else f"{found['divergence_bits']:.3f}",
        ]
        for name, found in named.items()
    ]
    header = ["", "in the catalog", "of them used", "products under those", "bits from the catalog"]
    lines += _table(header, rows)
    for name, found in named.items():
        for key, word in (("over", "more"), ("under", "less")):
            if found[key]:
                shown = "; ".join(
                    f"{_cell(row['name'])} ({row['catalog']:.1%} of the catalog, {row['candidates']:.1%} of the candidates)"
                    for row in found[key]
                )
                lines.append(f"- {name} that occur {word} than in the catalog: {shown}")
    largest = report["categories"]["top"]["largest"]
    if len(largest) < 2:
        largest = report["categories"]["leaf"]["largest"]
    if largest:
        rows = [
            [str(number), _cell(row["name"]), f"{row['catalog']:.1%}", f"{row['candidates']:.1%}"]
            for number, row in enumerate(largest, start=1)
        ]
        lines += ["", *_table(["no.", "category", "of the catalog", "of the candidates"], rows)]
    return [*lines, *_shown(pictures, "categories.png")]


def _candidates(report: Mapping[str, Any], pictures: Sequence[str]) -> list[str]:
    first, found, pairs = report["origins"]["first"], report["origins"]["any"], max(report["pairs"], 1)
    rows = [
        [
            _cell(name),
            f"{first.get(name, 0):,} ({first.get(name, 0) / pairs:.1%})",
            f"{found.get(name, 0):,} ({found.get(name, 0) / pairs:.1%})",
            ", ".join(f"{rank}: {count:,}" for rank, count in report["ranks"].get(name, {}).items()),
        ]
        for name in sorted(first.keys() | found.keys(), key=lambda name: -first.get(name, 0))
    ]
    header = ["origin", "pairs chosen for it", "pairs that it found at all", "ranks of those chosen"]
    return ["## Candidates", "", *_table(header, rows), *_shown(pictures, "origins.png")]


def _grades(report: Mapping[str, Any], pictures: Sequence[str]) -> list[str]:
    grades = report["grades"]
    if grades is None:
        return ["## Grades", "", "No labels were read.", ""]
    names = list(grades["grades"])
    rows = [["all", "", f"{grades['labeled']:,}", *_shares(grades["grades"], grades["labeled"]), ""]]
    for dimension, found in grades["by"].items():
        for name, row in found.items():
            shares = _shares(row["grades"], row["pairs"])
            rows.append([dimension, _cell(name), f"{row['pairs']:,}", *shares, f"{row['mean_gain']:.3f}"])
    failed = f" {grades['failed']:,} pairs have no label." if grades["failed"] else ""
    return [
        "## Grades of the teacher",
        "",
        f"{grades['labeled']:,} labeled pairs.{failed} In {grades['one_grade_share']:.1%} of {grades['groups']:,} groups "
        "all products have one grade: their margins teach little. From the best to the worst product of a group it is "
        f"{grades['mean_logit_range']:.2f} logits on average.",
        "",
        *_table(["by", "", "pairs", *(f"grade {_cell(name)}" for name in names), "mean gain"], rows),
        *_shown(pictures, "grades.png"),
    ]


def _shares(grades: Mapping[str, int], total: int) -> list[str]:
    return [f"{count / total:.1%}" for count in grades.values()]


def _about(value: int, exact: bool) -> str:
    return f"{value:,}" if exact else f"about {value:,}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [*("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]), ""]


def _shown(pictures: Sequence[str], *names: str) -> list[str]:
    return [line for name in names if name in pictures for line in (f"![{PICTURES[name]}]({name})", "")]


def twenty_groups(tables: Iterable[pa.Table], n: int = 20, seed: int = 0, scale: LabelScale | None = None) -> str:
    """n groups to read, drawn at random from GROUP or LABELED_GROUP tables, with grades where they are labeled.

    Args:
        tables: read once; n groups are held at a time.
        seed: another seed draws others; more tables change only as many groups as are replaced.
        scale: names the grades; without it, or with labels of other classes, a grade is the number of its class.
    """
    kept: list[tuple[int, int, dict[str, Any]]] = []
    for number, table in enumerate(tables):
        ids = table["query_id"].to_pylist()
        for row, identity in enumerate(ids):
            digest = hashlib.blake2b(f"{seed}\x1f{identity}\x1f{row}".encode("utf-8", "surrogatepass"), digest_size=8)
            order = -int.from_bytes(digest.digest(), "big")
            if len(kept) < n or order > kept[0][0]:
                item = (order, number * 1_000_000 + row, table.slice(row, 1).to_pylist()[0])
                (heapq.heappush if len(kept) < n else heapq.heappushpop)(kept, item)
    return "\n".join(_group_text(group, scale) for _, _, group in sorted(kept, reverse=True))


def _group_text(group: Mapping[str, Any], scale: LabelScale | None) -> str:
    lines = [f"{group['query']}    [{group['query_source']}]"]
    for product in group["products"] or []:
        fields = product["fields"] or {}
        origins = ", ".join(
            f"{origin['name']} {origin['rank']}" if origin["rank"] else origin["name"]
            for origin in product["origins"] or []
        )
        about = " / ".join(fields[name] for name in ("brand", "category") if fields.get(name))
        grade = _grade_text(product, scale)
        lines.append(f"  {grade}{(fields.get('title') or product['product_id']).strip()}  ({about})  <- {origins}")
    return "\n".join(lines) + "\n"


def _grade_text(product: Mapping[str, Any], scale: LabelScale | None) -> str:
    if "logit" not in product:
        return ""
    if product["error"] is not None or not product["class_logits"]:
        return f"{'failed':14}"
    best = int(np.argmax(product["class_logits"]))
    named = scale is not None and scale.num_classes == len(product["class_logits"])
    grade = scale.grades[best] if scale is not None and named else str(best)
    return f"{grade} {product['logit']:+.2f}".ljust(12) + "  "
