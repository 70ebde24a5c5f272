"""The HTTP service around a Localizer: plain FastAPI, without Ray (docs/serving.md)."""
