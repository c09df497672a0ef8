"""What some tests need and not every machine has: they skip where it is absent."""

import os
from pathlib import Path

import pytest

from tidar.errors import TidarError
from tidar.evaluate import sandbox

DATA = Path(os.environ.get("TIDAR_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""Public data sets as JSONL, which the project does not contain."""


def _confining() -> bool:
    try:
        sandbox.check()
    except TidarError:
        return False
    return True


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs public data sets (TIDAR_TEST_DATA)")
needs_sandbox = pytest.mark.skipif(
    not _confining(), reason="this machine cannot confine programs (see docs/evaluate.md)"
)
