# make demo: the main job on the built-in model. make test: the quick tests; make test-all: the long ones too.
# make web: the browser's page; make test-web: its library. make lint, bench: what their names say. Everything lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONTENDERS := $(VENV)/.contenders
OPTIMUM := .venv-optimum
GENAI := .venv-genai
WEB := runtime/web
PAGE := edgediff/site/page/index.html

.PHONY: demo web test test-long test-web test-all lint bench clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/edgediff demo -o out/demo

# The browser's page, where edgediff serve and edgediff site look for it; needs Node.js.
web: $(PAGE)

$(PAGE): $(WEB)/node_modules/.ready $(shell find runtime/web/src runtime/web/page -type f) runtime/web/build.js
	cd $(WEB) && npm run --silent build

$(WEB)/node_modules/.ready: $(WEB)/package.json $(WEB)/package-lock.json
	cd $(WEB) && npm ci --silent --no-audit --no-fund
	touch $@

test-web: $(WEB)/node_modules/.ready
	cd $(WEB) && npm run --silent check && npm test --silent

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST) -m "not long"

test-long: $(READY)
	$(PYTEST) -m long --durations 60 --durations-min 5

test-all: $(READY)
	$(PYTEST) --durations 60 --durations-min 5

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) $(CONTENDERS) $(OPTIMUM)/.ready $(GENAI)/.ready
	$(BIN)/python benchmarks/loop_overhead.py
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/adaptors.py
	$(BIN)/python benchmarks/planner.py
	$(BIN)/python benchmarks/students.py
	$(BIN)/python benchmarks/drawings.py
	$(BIN)/python benchmarks/against.py
	$(BIN)/python benchmarks/against.py sd15 --random-weights 0 --rounds 3 --optimum $(OPTIMUM)/bin/python
	$(BIN)/python benchmarks/elsewhere.py --optimum $(OPTIMUM)/bin/python --genai $(GENAI)/bin/python
	$(BIN)/python benchmarks/cost.py
	$(BIN)/edgediff export drawings-64 -o out/bench/drawings-64
	$(BIN)/edgediff export drawings-64 --layout split -o out/bench/drawings-64-split
	$(BIN)/edgediff bench out/bench/drawings-64
	$(BIN)/edgediff bench out/bench/drawings-64 out/bench/drawings-64-split --backend onnxruntime
	$(BIN)/edgediff export sd15 --random-weights 0 --adaptor identity --verify graphs -o out/bench/sd15
	$(BIN)/edgediff bench out/bench/sd15 --backend onnxruntime --steps 8 --rounds 6
	$(BIN)/edgediff bench out/bench/sd15 --backend onnxruntime --steps 8 --rounds 6 --guidance-scale 1
	$(BIN)/python benchmarks/cost.py --bundle out/bench/sd15 --steps 2 4 8 --images 1 2 4 --rounds 5
	$(BIN)/python benchmarks/coreml.py
	$(BIN)/python benchmarks/export_sd15.py
	$(BIN)/python benchmarks/pipelines.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("edgediff needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt -e ".[train,bench,executorch,litert,web,dev]"
	touch $@

# What benchmarks/against.py measures beside edgediff; one of them wants an environment of its own.
$(CONTENDERS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt -e ".[contenders]"
	touch $@

.venv-%/.ready: benchmarks/%-requirements.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

clean:
	rm -rf $(WEB)/node_modules $(dir $(PAGE)) $(VENV) $(OPTIMUM) $(GENAI) out .pytest_cache .mypy_cache .ruff_cache
