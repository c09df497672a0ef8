"""Quality by lm-evaluation-harness, acceptance by category, and methods side by side."""

import importlib.util
import logging

from tidar.errors import TidarError


def require_packages(what: str) -> None:
    """Raise TidarError where `what` cannot be done, because the packages of the extra `eval` are missing.

    What the harness has to say while it is used is kept to errors.
    """
    if any(importlib.util.find_spec(name) is None for name in ("lm_eval", "math_verify")):
        raise TidarError(f"{what} needs packages that are not installed: pip install 'tidar[eval]'")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
