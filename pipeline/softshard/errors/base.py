"""The base classes of all named errors: exit codes, one-line messages, and pickling between processes."""

from __future__ import annotations

__all__ = [
    "EXIT_BUG",
    "EXIT_DATA",
    "EXIT_JOB",
    "EXIT_TRY_AGAIN",
    "DataInvalid",
    "SoftshardError",
    "TryAgain",
    "exit_code_for",
]

EXIT_BUG = 1
EXIT_JOB = 2
EXIT_DATA = 3
EXIT_TRY_AGAIN = 75


class SoftshardError(Exception):
    """Base of every error that softshard raises on purpose; the command ends with its `exit_code`.

    The message is kept on one line. The error pickles with its message and attributes, so that one raised on a worker
    reaches the client whole.
    """

    exit_code = EXIT_BUG

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    def __reduce__(self) -> tuple[object, tuple[type[SoftshardError], str, dict[str, object]]]:
        return _rebuild, (type(self), str(self), self.__dict__)


def _rebuild(kind: type[SoftshardError], message: str, values: dict[str, object]) -> SoftshardError:
    error = kind.__new__(kind, message)
    SoftshardError.__init__(error, message)
    error.__dict__.update(values)
    return error


def exit_code_for(error: BaseException) -> int:
    """The exit code for any exception: an interrupt may be tried again, and an unnamed error is a bug."""
    if isinstance(error, SoftshardError):
        return error.exit_code
    return EXIT_TRY_AGAIN if isinstance(error, KeyboardInterrupt) else EXIT_BUG


class DataInvalid(SoftshardError):
    """Data is not what it claims to be; trying again cannot help."""

    exit_code = EXIT_DATA


class TryAgain(SoftshardError):
    """Something is unavailable for now; the same command may succeed later."""

    exit_code = EXIT_TRY_AGAIN
