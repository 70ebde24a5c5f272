"""Photos and what is known about them: storage, manifests, benchmarks, positives, decoding."""
