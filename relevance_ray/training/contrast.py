"""Contrast over a whole global batch, however it is split over workers and micro-batches.

A product is a negative of every other query of the batch, so no worker, and no micro-batch, can take this loss by itself.
First all vectors are computed without a graph and exchanged; each worker then has the gradient of the whole loss with
respect to its own vectors, and brings it in where it computes them again with a graph (gradient caching, Gao et al.,
arXiv 2101.06983). The price is a second forward pass.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from relevance_ray import distributed, losses
from relevance_ray.student.collate import TrainingGroups
from relevance_ray.student.packed import PackedTokens
from relevance_ray.student.two_tower import TowerReader, TwoTower


class Contrast:
    """InfoNCE of a two-tower over global batches.

    Args:
        temperature: of the contrast.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def begin(self, reader: TowerReader, model: TwoTower, groups: TrainingGroups | None, examples: np.ndarray) -> None:
        """Take the gradient of the global batch.

        Args:
            groups: those of this worker, one an example; None where it has none.
            examples: int64 [g], their numbers.
        """
        parts = distributed.gather(_side(reader, model, groups))
        all_queries, all_products, places, positives, identities, same = (
            list(column) for column in zip(*parts, strict=True)
        )
        first_group = np.cumsum([0, *(len(part) for part in all_queries)])
        first_row = np.cumsum([0, *(len(part) for part in all_products)])
        queries = torch.from_numpy(np.concatenate(all_queries)).requires_grad_()
        products = torch.from_numpy(np.concatenate(all_products)).requires_grad_()
        group = np.concatenate([part + start for part, start in zip(places, first_group, strict=False)])
        with torch.autocast("cpu", enabled=False):  # a similarity in bfloat16, divided by T, has steps of a tenth
            by_query = losses.info_nce(
                queries,
                products,
                torch.from_numpy(group),
                torch.from_numpy(np.concatenate(positives)),
                torch.from_numpy(np.concatenate(identities)),
                self.temperature,
                torch.from_numpy(np.concatenate(same)),
            )
        by_query.sum().backward()
        assert queries.grad is not None and products.grad is not None  # noqa: PT018
        own_groups = slice(first_group[distributed.rank()], first_group[distributed.rank() + 1])
        own_rows = slice(first_row[distributed.rank()], first_row[distributed.rank() + 1])
        self._values = by_query.detach()[own_groups]
        self._query_gradient, self._product_gradient = queries.grad[own_groups], products.grad[own_rows]
        self._offsets = np.zeros(1, dtype=np.int64) if groups is None else groups.offsets
        self._place_of = {int(example): index for index, example in enumerate(examples)}

    def loss(
        self, examples: np.ndarray, queries: torch.Tensor, products: torch.Tensor, groups: TrainingGroups
    ) -> torch.Tensor:
        """The loss of some examples of the batch that was begun: [g], with the gradient of the whole batch's.

        Args:
            queries, products: [n, d] unit vectors of their pairs, in the graph; a query's stands beside each product.
            groups: of the examples.
        """
        device = queries.device
        own = np.asarray([self._place_of[int(example)] for example in examples])
        rows = np.concatenate([np.arange(self._offsets[index], self._offsets[index + 1]) for index in own])
        first, place = (torch.from_numpy(rows).to(device) for rows in (groups.offsets[:-1], groups.place))
        gradient = self._query_gradient[own].to(device), self._product_gradient[rows].to(device)
        by_product = (products * gradient[1]).sum(dim=1)
        carrier = (queries[first] * gradient[0]).sum(dim=1).index_add(0, place, by_product)
        return self._values[own].to(device) + carrier - carrier.detach()


def _side(reader: TowerReader, model: TwoTower, groups: TrainingGroups | None) -> tuple[np.ndarray, ...]:
    """Of one worker: unit vectors of queries [g, d] and products [n, d], of each product its group, whether it is positive
    (the teacher's logit is above 0), and a number that equal products share; and one that groups of equal queries share,
    the parts of a group that was cut."""
    if groups is None:
        none = np.empty((0, int(model.encoder.config.hidden_size)), dtype=np.float32)
        no_number = np.empty(0, np.int64)
        return none, none, no_number, np.empty(0, bool), no_number, no_number
    with torch.no_grad():
        queries, products = reader.vectors(model, groups.pairs, np.arange(len(groups.target)))
    first = torch.from_numpy(groups.offsets[:-1]).to(queries.device)
    texts, query = groups.pairs.texts, groups.pairs.query
    assert query is not None  # of two towers the sides are apart
    return (
        queries[first].cpu().numpy(),
        products.cpu().numpy(),
        groups.place,
        groups.target > 0,
        _identities(texts, groups.pairs.product),
        _identities(texts, query[groups.offsets[:-1]]),
    )


def _identities(texts: PackedTokens, rows: np.ndarray) -> np.ndarray:
    """int64 [n]: equal for texts of equal tokens, on all workers."""
    spans = (texts.token_ids[texts.offsets[text] : texts.offsets[text + 1]] for text in rows)
    digests = b"".join(hashlib.blake2b(span.tobytes(), digest_size=8).digest() for span in spans)
    return np.frombuffer(digests, dtype=np.int64)
