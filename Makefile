# `make` installs MegaFlow into .venv; every other target does that first, and costs nothing when it is done.
# One of python3, python3.13, python3.12, python3.11 does the work: see tools/install.sh.

.PHONY: install quickstart char test test-all lint format help

# A PYTHONPATH from a login script or a module system would put other packages before those of .venv.
unexport PYTHONPATH PYTHONHOME

install:
	@bash tools/install.sh

quickstart: install  ## text to report on two CPU cores, in minutes
	@bash tools/run_path.sh quickstart

char: install  ## the same on characters, larger
	@bash tools/run_path.sh char

test: install  ## the tests, without those that take minutes
	@.venv/bin/python -m pytest -m "not long" -n 2 --dist loadfile --no-loadscope-reorder

test-all: install  ## all tests: hours, most of them the table of layouts, which goes on where it was
	@.venv/bin/python -m pytest

lint: install  ## ruff and mypy
	@.venv/bin/ruff check .
	@.venv/bin/mypy

format: install  ## what ruff can mend by itself
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

help:  ## this list
	@echo "make              install MegaFlow into .venv"
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 18
