"""The demo market: a catalog of any size, generated.

Product i is a pure function of (seed, i), so a catalog of ten thousand is the head of one of a hundred million, blocks
can be made in any order and nothing is kept. Draws are hashes of a counter (SplitMix64), whole columns at a time. The
price of independence: products do not cluster the way real ones do (no bestsellers, no seasons).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from relevance_ray.data.files import product_table
from relevance_ray.data.market_truth import FAMILY_OF_SHADE, TYPES
from relevance_ray.data.market_vocabulary import AUDIENCES, BRANDS, MATERIAL_KINDS, SIZES, STYLES
from relevance_ray.data.source import BLOCK_ROWS

TYPE_NAMES = list(TYPES)
SHADE_NAMES = list(FAMILY_OF_SHADE)
MATERIAL_NAMES = list(MATERIAL_KINDS)
AUDIENCE_NAMES = list(AUDIENCES)
BRAND_NAMES = list(dict.fromkeys(brand for brands in BRANDS.values() for brand in brands))
SIZE_NAMES = [sizes[0] for system in SIZES.values() for sizes in system]

ABSENT = -1


def draw(seed: int, stream: str, index: np.ndarray) -> np.ndarray:
    """uint64 [n]: SplitMix64 of a counter, one stream of numbers for each (seed, name)."""
    salt = np.uint64((int.from_bytes(stream.encode(), "big") * 0x9E3779B97F4A7C15 + seed * 0xD1B54A32D192ED03) % 2**64)
    return _mix(_mix(index.astype(np.uint64) + salt) + np.uint64(seed % 2**64))


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def below(seed: int, stream: str, index: np.ndarray, limit: int | np.ndarray) -> np.ndarray:
    """int64 [n]: uniform in [0, limit), `limit` one number or one a row."""
    return (draw(seed, stream, index) % np.asarray(limit, dtype=np.uint64)).astype(np.int64)


def chance(seed: int, stream: str, index: np.ndarray, probability: float) -> np.ndarray:
    """bool [n]: true with the given probability."""
    return draw(seed, stream, index) < np.uint64(int(probability * 2**64))


def _choices(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ragged lists as a padded int64 matrix and their lengths; an empty list offers ABSENT alone."""
    lists = [choices or [ABSENT] for choices in lists]
    out = np.full((len(lists), max(map(len, lists))), ABSENT, dtype=np.int64)
    for row, choices in enumerate(lists):
        out[row, : len(choices)] = choices
    return out, np.array([len(choices) for choices in lists])


_BRANDS_OF_TYPE = _choices([[BRAND_NAMES.index(b) for b in BRANDS[family.department]] for _, family in TYPES.values()])
_MATERIALS_OF_TYPE = _choices([[MATERIAL_NAMES.index(m) for m in kind.materials] for kind, _ in TYPES.values()])
_SIZES_OF_TYPE = _choices(
    [[SIZE_NAMES.index(s[0]) for s in SIZES[kind.sizes]] if kind.sizes else [] for kind, _ in TYPES.values()]
)
_AUDIENCES_OF_TYPE = _choices([list(range(len(AUDIENCE_NAMES))) if kind.audience else [] for kind, _ in TYPES.values()])
_PRICE_OF_TYPE = np.array([kind.price for kind, _ in TYPES.values()])
_SURFACES_OF_TYPE = [(kind.name, *kind.synonyms) for kind, _ in TYPES.values()]


@dataclass(frozen=True)
class ProductCodes:
    """What products are, as indices into the name lists of this module, int64 [n] each; ABSENT where there is none."""

    type: np.ndarray
    brand: np.ndarray
    shade: np.ndarray
    material: np.ndarray
    size: np.ndarray
    audience: np.ndarray
    cents: np.ndarray


def product_codes(seed: int, index: np.ndarray) -> ProductCodes:
    """The codes of the products with the given numbers, int64 [n]."""
    kind = below(seed, "type", index, len(TYPE_NAMES))

    def pick(stream: str, choices: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        table, lengths = choices
        return table[kind, below(seed, stream, index, lengths[kind])]

    spread = 2.0 ** (draw(seed, "price", index) / 2.0**64 * 2.0 - 1.0)
    return ProductCodes(
        type=kind,
        brand=pick("brand", _BRANDS_OF_TYPE),
        shade=below(seed, "shade", index, len(SHADE_NAMES)),
        material=pick("material", _MATERIALS_OF_TYPE),
        size=pick("size", _SIZES_OF_TYPE),
        audience=pick("audience", _AUDIENCES_OF_TYPE),
        cents=np.floor(_PRICE_OF_TYPE[kind] * spread).astype(np.int64) * 100 + 99,
    )


def _take(names: list[str], codes: np.ndarray, keep: np.ndarray | None = None) -> pa.Array:
    """The names of codes; null where ABSENT or not kept."""
    missing = codes < 0 if keep is None else (codes < 0) | ~keep
    return pa.array(names, pa.string()).take(pa.array(np.where(missing, 0, codes), mask=missing))


def _join(separator: str, *parts: pa.Array | str) -> pa.Array:
    columns = [pa.scalar(part) if isinstance(part, str) else part for part in parts]
    return pc.binary_join_element_wise(*columns, separator, null_handling="skip")


def _sentence(*parts: pa.Array | str) -> pa.Array:
    """Parts joined as they are; null where any of them is."""
    columns = [pa.scalar(part) if isinstance(part, str) else part for part in parts]
    return pc.binary_join_element_wise(*columns, "", null_handling="emit_null")


def products(seed: int, start: int, stop: int) -> pa.Table:
    """Products `start` to `stop` (excluded) as a `PRODUCT` table; ids are `p` and nine digits or more."""
    index = np.arange(start, stop, dtype=np.int64)
    codes = product_codes(seed, index)
    other_type = below(seed, "other type", index, len(TYPE_NAMES))
    other_brand = below(seed, "other brand", index, len(BRAND_NAMES))
    shade_2, shade_3 = (below(seed, stream, index, len(SHADE_NAMES)) for stream in ("shade 2", "shade 3"))

    flat = [surface.title() for surfaces in _SURFACES_OF_TYPE for surface in surfaces]
    lengths = np.array([len(surfaces) for surfaces in _SURFACES_OF_TYPE])
    offsets = np.cumsum(lengths) - lengths
    surface = _take(flat, offsets[codes.type] + below(seed, "surface", index, lengths[codes.type]))
    brand, shade = _take(BRAND_NAMES, codes.brand), _take(SHADE_NAMES, codes.shade)
    materials = [name.title() for name in MATERIAL_NAMES]
    model = _join(
        "",
        _take(list("ABCDEFGHKNPRTVWXYZ"), below(seed, "model letter", index, 18)),
        pa.array(below(seed, "model", index, 9000) + 1000).cast(pa.string()),
    )
    shown_shade = _take(SHADE_NAMES, codes.shade, chance(seed, "shows shade", index, 0.6))
    shown_material = _take(materials, codes.material, chance(seed, "shows material", index, 0.85))
    shown_size = _take(SIZE_NAMES, codes.size, chance(seed, "shows size", index, 0.9))
    audience_words = ["Women's", "Men's", "Kids", "Baby", "Unisex"]
    shown_audience = _take(audience_words, codes.audience, chance(seed, "shows audience", index, 0.9))
    style = _take(list(STYLES), below(seed, "style", index, len(STYLES)))
    pairing = _sentence("goes with ", _take(SHADE_NAMES, shade_2), " ", _take(TYPE_NAMES, other_type))
    titles = pc.choose(
        pa.array(below(seed, "title", index, 5)),
        _join(" ", brand, style, shown_material, surface, shown_shade, shown_size, shown_audience),
        _join(" ", surface, shown_audience, shown_material, shown_shade, shown_size, "-", brand, model),
        _join(" ", brand, model, shown_audience, surface, shown_size, shown_shade, shown_material),
        _join(", ", _join(" ", style, surface, "by", brand), shown_material, shown_size, shown_shade, shown_audience),
        _join(" ", brand, shown_audience, surface, shown_material, shown_shade, shown_size, "-", pairing),
    )
    descriptions = _join(
        " ",
        _sentence("This ", surface, " from ", brand, " is made to last."),
        _sentence("Made of ", _take(materials, codes.material), "."),
        _sentence("Also available in ", _take(SHADE_NAMES, shade_2), " and ", _take(SHADE_NAMES, shade_3), "."),
        _sentence(
            "Customers also look at ", _take(BRAND_NAMES, other_brand), " and our ", _take(TYPE_NAMES, other_type), "."
        ),
    )
    categories = [f"{family.department} > {family.name} > {kind.name}" for kind, family in TYPES.values()]
    columns = {
        "product_id": _join("", "p", pc.utf8_lpad(pa.array(index).cast(pa.string()), 9, "0")),
        "title": titles,
        "description": descriptions,
        "brand": brand,
        "color": shade,
        "category": _take(categories, codes.type),
        "attributes": _attributes(
            {
                "Material": _take(MATERIAL_NAMES, codes.material),
                "Size": _take(SIZE_NAMES, codes.size),
                "Audience": _take(AUDIENCE_NAMES, codes.audience),
                "Model": model,
            }
        ),
        "price": pa.array((codes.cents / 100).astype(np.float32)),
    }
    return product_table(columns, len(index))


def _attributes(columns: dict[str, pa.Array]) -> pa.MapArray:
    """A map per row from the columns that are not null there."""
    num_rows = len(next(iter(columns.values())))
    values = pa.concat_arrays(
        [column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column for column in columns.values()]
    )
    row_major = np.arange(len(values)).reshape(len(columns), num_rows).T.ravel()
    present = np.asarray(values.is_valid()).reshape(len(columns), num_rows).T
    keys = np.tile(np.arange(len(columns)), num_rows)[present.ravel()]
    offsets = np.concatenate([[0], np.cumsum(present.sum(axis=1))]).astype(np.int32)
    return pa.MapArray.from_arrays(
        pa.array(offsets),
        pa.array(list(columns), pa.string()).take(pa.array(keys)),
        values.take(pa.array(row_major[present.ravel()])),
    )


def stream_products(seed: int, size: int) -> Iterator[pa.Table]:
    """The catalog of a market of `size` products, as `PRODUCT` tables."""
    for start in range(0, size, BLOCK_ROWS):
        yield products(seed, start, min(start + BLOCK_ROWS, size))
