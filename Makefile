# Everything a stranger needs: `make run` and `make test` do all the set-up.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
END    ?= $(shell $(PYTHON) -c 'from datetime import date, timedelta; print(date.today() - timedelta(weeks=8))')

.PHONY: install run test ci wheel retrain bench lab clean

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

wheel:                              ## the wheel alone, in an empty environment without extras
	rm -rf build/wheel build/lib && $(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	build/wheel/bin/python -m pip install --quiet -c constraints.txt build/wheel/delta_go-*.whl
	cd build/wheel && bin/delta-go --help && bin/delta-go data simulate market --bars 600 && bin/delta-go backtest --data market --models ../../models

retrain: $(STAMP)                   ## a candidate from build/candles beside the champion; it stops eight weeks short, on bars for the gate
	rm -rf build/retrain && mkdir -p build/retrain/reports
	cp -r models build/retrain && cp -r reports/walk_forward build/retrain/reports
	$(BIN)/delta-go run --data build/candles --out build/retrain --end $(END) --allow-gaps

bench: $(STAMP)                     ## side-by-side speed ratios
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python -m benchmarks

lab: $(STAMP)                       ## explore in JupyterLab
	$(BIN)/jupyter lab nbs

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
