# make demo, make test, make faults, make lint, make docs, make bench [ONLY=round,flower] [QUICK=1]. Needs Python 3.11 to 3.13; makes its own environment in $(VENV).
VENV ?= .venv
BENCH_VENV ?= .venv-bench
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ "$$n" -gt 4 ] && n=4; echo $$n)
FAULT_WORKERS ?= 2
PYTHON_IN_VENV = $(VENV)/bin/python
DEMO = runs/demo

.PHONY: demo test faults lint docs bench

demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(PYTHON_IN_VENV) -m consilium run --out $(DEMO)/lora --set name=lora
	$(PYTHON_IN_VENV) -m consilium run --out $(DEMO)/linear --set name=linear --set 'tuner=[{name="linear"}]' \
		--set train.learning_rate=1e-2 --set 'evaluation.references=[]'
	$(PYTHON_IN_VENV) -m consilium report $(DEMO)/lora $(DEMO)/linear --out $(DEMO)/report.html

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest -q -n $(WORKERS)

# Real SuperLink and SuperNodes that are killed, cut off and lied to: about half an hour on 4 cores, 21 minutes with
# FAULT_WORKERS=3. Figures go to runs/faults-*.json, by release of Flower;
# `python examples/deployment/summary.py --into docs/results/deployment.md` tells.
faults: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(PYTHON_IN_VENV) -m pytest -q --faults -n $(FAULT_WORKERS) --dist worksteal --durations=0 tests/faults

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/.installed-dev
	$(PYTHON_IN_VENV) -m scripts.generate_docs

# Its own environment: a peer's narrow pins are not to decide which versions anything else here uses.
bench: $(BENCH_VENV)/.installed-bench
	OMP_NUM_THREADS=1 $(BENCH_VENV)/bin/python -m benchmarks $(if $(ONLY),--only $(ONLY)) $(if $(QUICK),--quick)

$(VENV)/.installed: pyproject.toml scripts/environment.sh
	sh scripts/environment.sh $(VENV)
	$(PYTHON_IN_VENV) -m pip install -q -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml scripts/environment.sh
	sh scripts/environment.sh $(VENV)
	$(PYTHON_IN_VENV) -m pip install -q -e '.[dev]'
	touch $@

$(BENCH_VENV)/.installed-bench: pyproject.toml scripts/environment.sh
	sh scripts/environment.sh $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install -q -e '.[bench]'
	touch $@
