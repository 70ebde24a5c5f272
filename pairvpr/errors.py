"""The one exception that is meant for the person at the keyboard."""


class UserError(ValueError):
    """Something a user gave is wrong: one line that says what, what was expected, and the valid choices.

    The jobs print its message without a traceback and exit with code 2. Whatever is not a `UserError` is a
    defect of the program and keeps its traceback.
    """


class IncompleteRunError(RuntimeError):
    """Some work failed for good; everything else is kept, and the same line again does what is missing.

    The jobs print its message without a traceback and exit with code 1.
    """
