"""Tests of the plug-in inside vLLM; `make test-vllm` runs them in an environment that has it, elsewhere they skip."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tidar.vllm.hooks import installed_version

sys.path.insert(0, str(Path(__file__).parent))
# Triton reads the variable when it is imported, which is before this file.
installed = installed_version() is not None and os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = (
    []
    if installed
    else ["test_vllm_served.py", "test_vllm_special.py", "test_vllm_structured.py", "test_vllm_server.py"]
)
if installed:
    os.environ.update(
        VLLM_USE_V2_MODEL_RUNNER="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from models import tiny_checkpoint

    return tiny_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def plain(checkpoint: str) -> dict[str, Any]:
    """What plain vLLM answers. Engines share process groups, so one has to end before another begins."""
    from cases import EDGE, PROCESSED, PROMPTS
    from engines import answers, engine

    from tidar.vllm import Options

    with engine(checkpoint, Options(mode="ar", max_num_seqs=8)) as llm:
        return {
            "greedy": answers(llm, PROMPTS, 60),
            "processed": [answers(llm, PROMPTS[:2], **params) for params in PROCESSED],
            "edge": answers(llm, EDGE, 100),
        }
