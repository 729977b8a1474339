"""Run a model over pairs, batched by tokens: one protocol for every engine."""
