"""Exceptions whose messages are meant for users. Messages contain no secrets."""

from __future__ import annotations

from pairvpr.secrets import without_secrets


class UserError(ValueError):
    """Something a user gave is wrong: one line that says what, what was expected, and the valid choices.

    The jobs print its message without a traceback and exit with code 2. Unexpected exceptions are bugs and keep their
    traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class PhotoError(UserError):
    """A query photo can't be read: `photo` names it, `reason` says why."""

    def __init__(self, photo: str, reason: str) -> None:
        super().__init__(f"{photo}: {reason}")
        self.photo = photo
        self.reason = reason

    def __reduce__(self) -> tuple[type[PhotoError], tuple[str, str]]:
        return type(self), (self.photo, self.reason)


class UserNetworkError(UserError):
    """A network of the user's environment fails on photos; the message names its function."""


class IncompleteRunError(RuntimeError):
    """Some work failed for good. Everything else is kept, and running the same command again does what is missing.

    The jobs print its message without a traceback and exit with code 1.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))
