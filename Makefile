# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= demo-output

.PHONY: demo test fast coverage tutorials docs lint setup clean

demo: $(VENV)/.installed-demo
	$(BIN)/pyro-apd demo --out $(OUT)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal

# What is neither slow nor thorough: under two minutes on two cores.
fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal -m fast

coverage: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term

# Every notebook, with little work in it; tutorials/execute.py runs them in full and writes them.
tutorials: $(VENV)/.installed-tutorials $(VENV)/.installed-test
	PYRO_APD_TUTORIAL_QUICK=1 $(BIN)/python -m pytest --nbmake tutorials

# The site, into site/. Nothing is fetched; a warning is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.installed-test

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp an extra, so that a second run installs nothing.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(patsubst dev,test$(comma)dev,$*)]'
	@touch $@

comma := ,

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info
