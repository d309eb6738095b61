# Two commands do everything: `make demo` and `make test`. Each makes .venv first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ASSETS := .cache/assets
STAMP := $(VENV)/.installed
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)

.PHONY: setup demo test bench lint format clean

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first: the extension is compiled against the torch that it will run with.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/pip install -q 'torch>=2.10' 'setuptools>=77' ninja numpy
	touch $@

$(STAMP): $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[dev,demo]'
	touch $@

$(ASSETS)/.installed: demo/requirements.txt | $(BIN)/python
	$(BIN)/pip install -q --no-deps --target $(ASSETS) --upgrade -r demo/requirements.txt
	touch $@

demo: setup $(ASSETS)/.installed
	$(BIN)/python demo/demo.py --out out/demo

test: setup
	$(BIN)/python -m pytest

bench: setup
	$(BIN)/python -m pytest bench --benchmark-columns=median,min,max --benchmark-json=out/bench.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu')

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu')

clean:
	rm -rf $(VENV) build out *.egg-info liar_ext/*.so
