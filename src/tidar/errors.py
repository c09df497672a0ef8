"""The one exception that is meant for people: what is wrong, where, and what to do, in one sentence."""


class TidarError(ValueError):
    """Bad input or an impossible request; the command line prints it as one line and exits with code 2."""
