"""The one exception that is meant for people: what is wrong, where, and what to do, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

NO_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED", "Storage size calculation overflowed")
"""What torch says where memory ends, on a GPU, on a CPU and in a GPU's libraries: it has no one class for it."""


class TidarError(ValueError):
    """Bad input or an impossible request; the command line prints it as one line and exits with code 2."""


def first_line(error: BaseException) -> str:
    """What a foreign exception says, fit for one line of ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class PromptError(TidarError):
    """A prompt of a job that cannot be used: its row, and why. Whoever knows where the row came from can say so."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(row, reason)
        self.row, self.reason = row, reason

    def __str__(self) -> str:
        return f"prompt {self.row + 1}: {self.reason}"


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came from, says that memory ended."""
    while error is not None:
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def memory_for(what: str, advice: str) -> Iterator[None]:
    """Where memory ends inside, a TidarError says with what, and what needs less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise TidarError(f"out of memory with {what}: {advice}") from error
