# Everything a stranger needs: `make run` and `make test` do all the set-up.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: install run test ci bench lab clean

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

install: $(STAMP)                   ## environment and package

run: $(STAMP)                       ## the main job on the embedded market; prints where the report is
	$(BIN)/delta-go run

test: $(STAMP)                      ## notebooks in sync, house rules, every chapter, every test
	$(BIN)/ruff check nbs delta_go tests benchmarks setup.py
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow"

ci: test                            ## what is too slow for every day
	$(BIN)/pytest -m slow

bench: $(STAMP)                     ## side-by-side speed ratios
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python -m benchmarks

lab: $(STAMP)                       ## explore in JupyterLab
	$(BIN)/jupyter lab nbs

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
