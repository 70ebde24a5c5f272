"""Configuration: the schema as dataclasses, and the one module that speaks Hydra."""
