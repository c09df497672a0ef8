"""Computing in a thread that ends, before another thread is to compute for long.

OpenMP keeps a team of threads for every thread that has computed. Once there are more of them than processors they no
longer wait actively for each other: on two cores every matrix product of a decode step then takes twice as long. So
what serves loads its model here, and leaves the processors to the thread that decodes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def apart(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises; it runs in a thread of its own, which Ctrl-C leaves behind."""
    results, errors = list[Result](), list[BaseException]()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="tidar-apart", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
