"""Photos drawn by code: a small city, and the public benchmarks and training sets in miniature."""
