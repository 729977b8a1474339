"""The catalog, searched: products, BM25 and vectors, in shards."""
