# `make demo` and `make test` need nothing but Python 3.11 or newer: they make .venv and install what
# they use. With PYTHON=… they use that environment as it is and install nothing.

ifdef PYTHON
RUN := $(PYTHON)
else
BASE := $(firstword $(foreach p,python3.13 python3.12 python3.11 python3,$(shell \
	$(p) -c 'import sys; sys.version_info >= (3, 11) or exit(1)' 2>/dev/null && echo $(p))))
RUN := .venv/bin/python
READY := .venv/.ready
READY_FOR_DOCS := .venv/.ready-for-docs
endif

.PHONY: demo test check docs bench clean

demo: $(READY)
	$(RUN) -m cnf compare pinwheel --seconds 15

test: $(READY)
	$(RUN) -m pytest $(shell $(RUN) -c 'import xdist; print("-n 2 --dist worksteal")' 2>/dev/null)

check: $(READY)
	$(RUN) -m ruff format --check
	$(RUN) -m ruff check
	$(RUN) -m basedpyright --pythonpath $(RUN)

# Warnings are errors: every link between pages and to the API has to be there.
docs: $(READY_FOR_DOCS)
	$(RUN) -m sphinx -W --keep-going --quiet docs docs/_build/html
	@echo "The site: docs/_build/html/index.html"

# Not as extras: they ask for torchvision, Lightning and a tensorboard of their own, unused here.
bench: $(READY)
ifndef PYTHON
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[all,test,bench]'
	.venv/bin/python -m pip install --quiet --no-deps torchcfm==1.0.7 nflows==0.14 normflows==1.7.3
endif
	$(RUN) experiments/benchmark/run.py

.venv/.ready: pyproject.toml constraints.txt
	@test -n "$(BASE)" || { echo "Python 3.11 or newer is needed"; exit 1; }
	test -x .venv/bin/python || $(BASE) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[all,test]'
	@touch $@

.venv/.ready-for-docs: .venv/.ready
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf docs/_build docs/experiments docs/notebooks .venv .pytest_cache .ruff_cache .hypothesis dist build
