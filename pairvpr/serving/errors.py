"""What a request can get instead of an answer: a status, a code for programs, and one line for people."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RequestError(Exception):
    """A refusal. Its message holds no path of this machine and no secret."""

    status: int
    code: str
    message: str
    retry_after_s: int | None = None


def busy(what: str, retry_after_s: int) -> RequestError:
    """503: more than the service takes."""
    return RequestError(503, "busy", f"{what}; try again in {retry_after_s} s", retry_after_s)


def too_late() -> RequestError:
    """504: the time for the request is over, and its work has stopped."""
    return RequestError(504, "too_late", "the time for this request is over (serve.timeout_s); its work was stopped")


def unavailable() -> RequestError:
    """503: the index or its store fails; the log says how."""
    return RequestError(503, "unavailable", "the index can't be read at the moment; try again in 5 s", 5)


def not_described() -> RequestError:
    """422: the network of the user's that describes photos fails on this one; the log says how."""
    return RequestError(422, "not_described", "the network of descriptor.module fails on this photo")


def not_found(what: str) -> RequestError:
    """404."""
    return RequestError(404, "not_found", what)
