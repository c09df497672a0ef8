"""A gated LoRA's kernel against its eager twin, in Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar.kernels.gated import add_gated, add_gated_eager

pytest.importorskip("triton")
INTERPRETED, NATIVE = os.environ.get("TRITON_INTERPRET") == "1", torch.cuda.is_available()
DEVICE = "cuda" if NATIVE and not INTERPRETED else "cpu"


@pytest.mark.skipif(INTERPRETED or NATIVE, reason="the test below runs here")
def test_kernel_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not (INTERPRETED or NATIVE), reason="runs in the subprocess above")
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 40), st.integers(1, 300), st.integers(1, 150), st.integers(0, 2), st.integers(0, 99))
def test_what_the_kernel_adds(tokens, width, rank, opened, seed):
    generator = torch.Generator().manual_seed(seed)
    product = torch.randn(tokens, width + rank, generator=generator).to(DEVICE)
    b = torch.randn(width, rank, generator=generator).to(DEVICE)
    gate = (torch.rand(tokens + 3, 1, generator=generator) < opened / 2).float().to(DEVICE)[:tokens]
    torch.testing.assert_close(add_gated(product, b, gate), add_gated_eager(product, b, gate), atol=1e-4, rtol=1e-4)
