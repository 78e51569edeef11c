"""The blocked backend: plain torch, one tile of queries at a time."""
