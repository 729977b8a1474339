"""Options that describe themselves.

Each part declares its options as a frozen dataclass of `option(...)` fields, so that a core needs no configuration
library and a default stands in one place. `config.py` validates them from YAML; the fingerprint of a step hashes the
semantic ones and leaves out the operational ones (how many actors, how large a batch), which change speed, not results.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

STRICT = {"extra": "forbid"}
"""Set as `__pydantic_config__` on an options dataclass: an unknown key is refused wherever it is validated."""


def option(
    default: Any,
    description: str,
    *,
    operational: bool = False,
    operational_keys: Collection[str] = (),
    added_later: bool = False,
) -> Any:
    """A dataclass field with a description; `operational` ones do not enter fingerprints, nor do the `operational_keys` of
    one that is a mapping, nor an option `added_later` (its default is what was done before there was one) while it has
    its default. A list or dict default is copied for each instance; `dataclasses.MISSING` makes the field required."""
    metadata = {
        "description": description,
        "operational": operational,
        "operational_keys": frozenset(operational_keys),
        "added_later": added_later,
    }
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, list | dict | set) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: _copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _copy(value: Any) -> Any:
    return dataclasses.replace(value) if dataclasses.is_dataclass(value) else type(value)(value)  # type: ignore[type-var]


def semantic(options: Any) -> dict[str, Any]:
    """The options that decide results, as plain JSON values, nested options included."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        unchanged = field.metadata.get("added_later", False) and value == field.default
        if not field.metadata.get("operational", False) and not unchanged:
            if left_out := field.metadata.get("operational_keys"):
                value = {key: item for key, item in value.items() if key not in left_out}
            out[field.name] = _plain(value)
    return out


def changed(options: Any) -> dict[str, Any]:
    """The options that are not at their default, as plain values, operational ones among them."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        factory = field.default_factory
        if value == (field.default if factory is dataclasses.MISSING else factory()):
            continue
        if dataclasses.is_dataclass(value):
            out[field.name] = changed(value)
        elif isinstance(value, list):
            out[field.name] = [changed(item) if dataclasses.is_dataclass(item) else item for item in value]
        else:
            out[field.name] = value
    return out


def by_key(values: Mapping[str, Any]) -> dict[str, str]:
    """Nested values as text by dotted key, "student.fit.epochs": "2", "teacher.members.0.kind": "bm25"."""
    out: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping) and value:
            out |= {f"{name}.{key}": text for key, text in by_key(value).items()}
        else:
            out[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return out


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return semantic(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
