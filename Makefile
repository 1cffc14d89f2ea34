# Two commands: `make demo Q="..."` and `make test`. Both set up what they need first and skip what is done.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
Q ?= What is the capital of France?
BIN := .venv/bin
TS := clients/typescript
CLIENTS := tests/clients/node
DONE := .make

# Linux has two MLX backends, chosen at install time; macOS has Metal, and needs neither.
ifeq ($(shell uname -s),Darwin)
  EXTRAS ?= dev
else ifneq ($(shell command -v nvidia-smi),)
  EXTRAS ?= cuda,dev
else
  EXTRAS ?= cpu,dev
endif

say = @printf '\033[1m==> %s\033[0m\n' $(1)

.PHONY: help
help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.PHONY: demo
demo: $(DONE)/install $(DONE)/typescript $(DONE)/model ## ask the demo model a question: make demo Q="..."
	@PATH="$(CURDIR)/$(BIN):$$PATH" node $(TS)/dist/examples/chat.js "$$Q"
demo: export Q := $(Q)

.PHONY: test
test: check $(DONE)/typescript $(DONE)/clients $(DONE)/model ## every check and every test
	$(call say,"Python tests")
	@$(BIN)/pytest
	$(call say,"TypeScript tests")
	@cd $(TS) && PATH="$(CURDIR)/$(BIN):$$PATH" npx --no-install vitest run

.PHONY: check
check: $(DONE)/install $(DONE)/node_modules ## ruff, pyright, tsc, clang-format
	$(call say,"Static checks")
	@$(BIN)/ruff format --check --quiet . || { echo "run: make format"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/clang-format --dry-run --Werror native/src/*.cpp native/include/mlx_sidecar/*.hpp tests/unit/native/*.cpp
	@$(BIN)/pyright --warnings
	@cd $(TS) && node scripts/generate.mjs --check
	@cd $(TS) && npx --no-install tsc

.PHONY: generate
generate: $(DONE)/install $(DONE)/node_modules ## write what is made from the types of protocol and settings
	@mkdir -p build
	@$(BIN)/mlx-sidecar schema > build/openrpc.json && mv build/openrpc.json protocol/openrpc.json
	@$(BIN)/mlx-sidecar schema --format markdown > build/protocol.md && mv build/protocol.md docs/protocol.md
	@$(BIN)/mlx-sidecar config --default > build/runtime.yaml && mv build/runtime.yaml config/runtime.yaml
	@cd $(TS) && node scripts/generate.mjs

.PHONY: format
format: $(DONE)/install ## rewrite the code in the house style
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i native/src/*.cpp native/include/mlx_sidecar/*.hpp tests/unit/native/*.cpp

.PHONY: bench
bench: $(DONE)/install $(DONE)/typescript $(DONE)/clients $(DONE)/model ## measure; results go to benchmarks/results
	@$(BIN)/python benchmarks/startup.py
	@$(BIN)/python benchmarks/single_stream.py
	@$(BIN)/python benchmarks/blas.py
	@$(BIN)/python benchmarks/ping.py
	@$(BIN)/python benchmarks/wire.py

.PHONY: bench-engine
bench-engine: $(DONE)/install $(DONE)/typescript $(DONE)/model ## measure many streams against mlx-lm: a quarter of an hour
	@$(BIN)/python benchmarks/engine.py

.PHONY: bench-models
bench-models: $(DONE)/install $(DONE)/model ## measure many models and adapters in one memory: a quarter of an hour
	@$(BIN)/python benchmarks/models.py
	@$(BIN)/python benchmarks/adapters.py
	@$(BIN)/python benchmarks/prediction.py

.PHONY: clean
clean: ## remove everything that was built here (not the models)
	rm -rf .venv build $(DONE) $(TS)/node_modules $(TS)/dist $(CLIENTS)/node_modules native/*.so *.egg-info

$(DONE)/venv:
	$(call say,"Creating .venv")
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	@$(PYTHON) -m venv .venv
	@mkdir -p $(DONE) && touch $@

$(DONE)/install: $(DONE)/venv pyproject.toml setup.py $(wildcard native/src/*.cpp native/include/*/*.hpp)
	$(call say,"Installing the sidecar and its native module ($(EXTRAS))")
	@$(BIN)/pip install --disable-pip-version-check -e '.[$(EXTRAS)]'
	@mkdir -p build/links/mlx_sidecar
	@for part in runtime protocol config native; do ln -sfn "$(CURDIR)/$$part" build/links/mlx_sidecar/$$part; done
	@ln -sfn "$(CURDIR)/clients/python" build/links/mlx_sidecar/client
	@ln -sfn "$(CURDIR)/tests/conformance" build/links/mlx_sidecar/conformance
	@touch $@

$(DONE)/node_modules: $(TS)/package.json $(TS)/package-lock.json
	$(call say,"Installing the TypeScript tools")
	@cd $(TS) && npm ci --no-audit --no-fund --loglevel=error
	@mkdir -p $(DONE) && touch $@

$(DONE)/clients: $(CLIENTS)/package.json $(CLIENTS)/package-lock.json
	$(call say,"Installing the npm clients that the tests drive")
	@cd $(CLIENTS) && npm ci --no-audit --no-fund --loglevel=error
	@mkdir -p $(DONE) && touch $@

$(DONE)/typescript: $(DONE)/node_modules $(TS)/scripts/build.mjs \
    $(wildcard $(TS)/tsconfig*.json $(TS)/src/*.ts $(TS)/src/generated/*.ts $(TS)/examples/*.ts)
	$(call say,"Compiling the TypeScript client")
	@cd $(TS) && node scripts/build.mjs
	@touch $@

# `pull` finds a model that is complete by itself, so it runs every time and costs a fraction of a second.
.PHONY: $(DONE)/model
$(DONE)/model: $(DONE)/install
	@$(BIN)/mlx-sidecar pull smollm2-135m > /dev/null
