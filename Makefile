# make demo    everything on this machine, live; ARGS="--for 30" ends by itself
# make test    the tests, with genuine Kafka
# make check   what CI checks: style, types
# make bench   how fast, beside the limits; ARGS="latency http --out figures/" measures these, see carousel bench --help
# make chaos   what it survives: workers and Kafka killed, stopped, thrown out; some minutes
# make docs    docs/settings.md, from the settings; Kubernetes' copy of Prometheus' rules, from these
# make dashboards    Grafana's, from deploy/dashboards.py
# make setup   .venv with all that these need (each of them calls it)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test check format bench chaos docs dashboards clean

setup: $(READY)

# uv installs torch in a tenth of pip's time; it comes by pip itself, so nothing else need be there.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Carousel needs Python 3.11 or later; name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[train,backtest,broker,fast,page,dev]'
	touch $@

demo: $(READY)
	@$(BIN)/carousel demo $(ARGS)

# Three files at a time: most of a test is waiting for processes. Each has a Kafka of its own.
test: $(READY)
	$(BIN)/pytest --numprocesses 3 --dist loadfile $(ARGS)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY)
	@$(BIN)/carousel bench $(ARGS)

chaos: $(READY)
	@$(BIN)/carousel chaos $(ARGS)

docs: $(READY)
	$(BIN)/python -c 'from service.settings import reference; print(reference(), end="")' > docs/settings.md
	$(BIN)/python -c 'from deploy.rules import prometheus_rule; print(prometheus_rule(), end="")' \
	  > deploy/kubernetes/monitoring/rules.yaml

dashboards: $(READY)
	$(BIN)/python -m deploy.dashboards

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
