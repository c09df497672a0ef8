"""The one exception that is meant for people: what is wrong, where, and what to do, in one sentence."""


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
