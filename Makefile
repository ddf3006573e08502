# `make train` and `make test` work as the first command on a fresh clone. Both put what they need
# into .venv, once: again only after requirements.txt has changed.
# `make plots` redraws all figures and tables of results; it has a small environment of its own.
# ARGS="..." appends flags to the training command or to pytest.

# Tried, not just looked up: a version manager may hold a python3.11 that it does not run.
PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)

.PHONY: train test plots

train: .venv/installed
	.venv/bin/python dreamer.py --configs vmas --task vmas_simple_spread \
		--logdir ./logdir/vmas_simple_spread $(ARGS)

test: .venv/installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m pytest -n auto --dist loadfile $(ARGS)

.venv/installed: requirements.txt
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or newer is needed')"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -r requirements.txt
	touch $@

plots: .venv-plots/installed
	.venv-plots/bin/python -m benchmarks.plot

.venv-plots/installed: benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-plots
	.venv-plots/bin/python -m pip install -r benchmarks/requirements.txt
	touch $@
