"""Descriptor shards and faiss: store, build, search, merge."""
