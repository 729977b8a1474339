"""From options to a source: which reader reads which layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from relevance_ray.data import chorus, esci, files, generic, homedepot, market_queries, wands
from relevance_ray.data.source import DataOptions, Source
from relevance_ray.storage import is_remote, localize


def files_read(options: DataOptions) -> list[str]:
    """The files of the data's folder that make the run, and the query log; another file beside them changes nothing."""
    options = _at_hand(options)
    names = {"esci": esci.FILES, "wands": wands.FILES, "homedepot": homedepot.FILES, "chorus": chorus.FILES}
    found = generic.files_read(options) if options.format == "generic" else []
    found += [Path(options.path, name) for name in names.get(options.format, ())]
    return [*map(str, found), *([options.queries] if options.queries else [])]


def _at_hand(options: DataOptions) -> DataOptions:
    """The same with local paths: what lies on S3 is copied to the cache, once for each content."""

    def local(path: str) -> str:
        return str(localize(path)) if is_remote(path) else path

    return replace(options, path=local(options.path), queries=local(options.queries))


def open_source(options: DataOptions) -> Source:
    """The source that `options` describe. Raises `UserError` where files or columns are missing or unreadable."""
    readers: dict[str, Callable[[DataOptions], Source]] = {
        "market": market_queries.open_market,
        "esci": esci.open_esci,
        "wands": wands.open_wands,
        "homedepot": homedepot.open_homedepot,
        "chorus": chorus.open_chorus,
        "generic": generic.open_generic,
    }
    options = _at_hand(options)
    source = readers[options.format](options)
    if options.queries:
        log = files.query_log(options.queries)
        next(log(), None)  # a bad file or a missing column shows now, not after an hour
        return replace(source, queries=log)
    return source
