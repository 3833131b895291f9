# The two commands of a newcomer are `make run` and `make test`; both install what they need first.
PYTHON ?= python3
VENV := .venv
GOLF := $(VENV)/bin/python -m paramgolf
ifneq ($(wildcard ../shared),)
export PARAMGOLF_SHARED ?= $(abspath ../shared)
endif

.PHONY: run install test test-full lint bench wheel clean

run: install
	$(GOLF) run pocket

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# -n 2: the suite is written for two cores; each worker computes on one thread.
test: install lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m 'not full'

test-full: install
	$(VENV)/bin/python -m pytest -m full

lint: install
	$(VENV)/bin/ruff check src tests bench
	$(VENV)/bin/mypy

bench: install
	@failed=; for name in weight_codec scoring train_cpu pocket; do \
		$(VENV)/bin/python -m bench.$$name || failed="$$failed $$name"; \
	done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

wheel: install
	$(VENV)/bin/python -m build --wheel

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
