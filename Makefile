# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= demo-output

# The runtime of the page for the browser; its integrity is checked where it is used.
RUNTIME := build/onnxruntime-web-1.30.0.tgz

.PHONY: demo page test fast thorough coverage tutorials docs lint wheel setup clean

demo: $(VENV)/.installed-demo
	$(BIN)/pyro-apd demo --out $(OUT) $(if $(wildcard $(RUNTIME)),--runtime $(RUNTIME))

# The demo's page with its runtime, which npm fetches once.
page: $(OUT)/posterior.safetensors $(RUNTIME)
	$(BIN)/pyro-apd page $(OUT)/posterior.safetensors --model pyro_apd.cli.demo:digit_model --data $(OUT)/digits.npz \
	    --image 8x8 --title "Handwritten digits: what do 50 networks say?" --runtime $(RUNTIME) --out $(OUT)/page

$(OUT)/posterior.safetensors:
	$(MAKE) demo

$(RUNTIME):
	mkdir -p build
	npm pack --silent --pack-destination build onnxruntime-web@1.30.0

# All but the thorough tests: under six minutes on two cores.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal

# What is neither slow nor thorough: under a minute on two cores.
fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal -m fast

# What `make test` leaves out.
thorough: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal -m thorough

coverage: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term

# Every notebook, with little work in it; tutorials/execute.py runs them in full and writes them.
tutorials: $(VENV)/.installed-tutorials $(VENV)/.installed-test
	PYRO_APD_TUTORIAL_QUICK=1 $(BIN)/python -m pytest --nbmake tutorials

# The site, into site/. There are no downloads; a warning is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Wheel and source distribution into dist/; then the demo from the wheel, in an environment without the sources.
# PIP_CONSTRAINT also applies to isolated builds.
wheel: $(VENV)/.installed-dev
	rm -rf dist build/wheel && mkdir -p build/wheel
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet -c constraints.txt "$$(echo dist/*.whl)[demo]"
	cd build/wheel && venv/bin/pyro-apd demo --quick --out demo-output

setup: $(VENV)/.installed-test

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp file per extra, so that a second run installs nothing.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(patsubst dev,test$(comma)dev,$*)]'
	@touch $@

comma := ,

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info
