# make demo   warm-starts a language model in a second language and opens with a page that shows what was saved
# make test   proves the package: notebooks, tests, layers, wheel
# make lab    opens JupyterLab on the notebooks, with this project's Python as their kernel
# make readme writes README.md anew from nbs/index.ipynb and results/
# make docs   builds the site in _docs/ from the notebooks, which it runs; what ran before and is unchanged is kept
# Each sets up .venv first if it is missing or out of date.   make PYTHON=python3.12 demo   chooses the interpreter.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test lab readme docs clean
.DELETE_ON_ERROR:

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# A set-up is known by what determines it: these files, the interpreter, and the folder (a .venv does not survive moving).
KEY := $(shell { cat settings.ini constraints.txt setup.py pyproject.toml; echo '$(CURDIR)'; '$(PYTHON)' -c 'import sys; print(sys.version)'; } 2>&1 | cksum | cut -d' ' -f1)
stamp = .venv/.ready-$(1)-$(KEY)

help:
	@sed -n 's/^# \(make\)/\1/p' Makefile

# what is installed for tests serves the demo as well; an interpreter that went away makes either stale
alive := $(shell $(BIN)/python -c 'pass' 2>/dev/null && echo yes)
ready = $(if $(alive),$(firstword $(foreach k,$(1),$(wildcard $(call stamp,$(k))))))

demo: $(if $(call ready,run dev),,setup-run)
	@$(BIN)/seqwarm run clp --scale demo --name demo

test: $(if $(call ready,dev),,setup-dev)
	@$(BIN)/python tests/checks.py

lab: $(if $(call ready,lab),,setup-lab)
	@$(BIN)/jupyter lab nbs

readme: $(if $(call ready,dev),,setup-dev)
	@$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --execute --no-input --output-dir . --output README nbs/index.ipynb

docs: $(if $(call ready,dev),,setup-dev)
	@$(BIN)/python nbs/site/build.py

setup-%:
	@[ -n '$(PYTHON)' ] || { echo 'seqwarm: no Python 3.11 to 3.13 found; install one, or name it: make PYTHON=/path/to/python3.12' >&2; exit 2; }
	@'$(PYTHON)' -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo 'seqwarm: $(PYTHON) is not Python 3.11 to 3.13; name another: make PYTHON=/path/to/python3.12' >&2; exit 2; }
	@'$(PYTHON)' -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo 'seqwarm: $(PYTHON) cannot make environments; install its venv module (Debian: apt install python3-venv)' >&2; exit 2; }
	@rm -f .venv/.ready-*
	@a=$$('$(PYTHON)' -c 'import sys; print(sys.version)'); b=$$($(BIN)/python -c 'import sys; print(sys.version)' 2>/dev/null); \
		h=$$(cat .venv/.here 2>/dev/null || echo '$(CURDIR)'); \
		if [ "$$a" != "$$b" ] || [ "$$h" != '$(CURDIR)' ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; \
		then echo 'making .venv'; '$(PYTHON)' -m venv --clear .venv; fi
	@echo '$(CURDIR)' > .venv/.here
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.$(patsubst %,[%],$(filter-out run,$*))'
	$(if $(filter lab,$*),$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name 'Python 3 (seqwarm)')
	@touch $(call stamp,$*)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache _docs _proc
