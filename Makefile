# make setup  the environment (.venv), once; again only when its files change
# make demo   the whole method on the tiny default, in minutes
# make test   all tests

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/installed

# glibc's huge pages: XLA asks for all memory of a step anew each time (docs/performance.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: setup demo test lint

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	    --constraint constraints.txt --editable '.[cpu,dev]'
	touch $@

demo: setup
	$(VENV)/bin/python scripts/train.py --config configs/tiny.py --workdir runs/tiny --new_if_finished

test: setup
	$(VENV)/bin/python -m pytest

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
