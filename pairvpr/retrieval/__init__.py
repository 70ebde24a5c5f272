"""The two steps of inference on one machine: retrieval and re-ranking."""
