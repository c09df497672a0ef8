"""Work that is done apart is done, or fails, as if it were not; its thread is gone afterwards."""

import threading

import pytest

from tidar import TidarError
from tidar.apart import apart


def test_the_result_comes_from_a_thread_that_has_ended():
    thread = apart(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_an_error_is_raised_here():
    def fail() -> None:
        raise TidarError("no")

    with pytest.raises(TidarError, match="no"):
        apart(fail)


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_servers_load_and_measure_where_nothing_computes_later(command, run, monkeypatch, tmp_path):
    """Else two teams of threads wait for each other passively, and decoding takes twice as long on two cores."""
    seen = []

    def load(*args):
        seen.append(threading.current_thread())
        raise TidarError("seen")

    monkeypatch.setattr("tidar.cli.options.load", load)
    engine = ["--engine", "local"] if command == "serve" else []
    code, _, err = run(command, "--model", tmp_path, "--port", 0, *engine)
    assert (code, err.strip()) == (2, "tidar: seen")
    assert seen[0] is not threading.current_thread()
