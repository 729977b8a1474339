"""What a causal language model is asked.

The query comes first, so that an engine can keep its prefix for all candidates of a group, and the question last, because
the head reads the last token. Plain words, no chat markup: the head is trained, so nothing has to be coaxed out of the
model.
"""

from __future__ import annotations

DEFAULT_PROMPT = "Search query: {query}\nProduct: {product}\nHow well does the product answer the query? Grade:"
