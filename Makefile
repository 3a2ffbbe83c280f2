# Everything a developer runs, from a machine with Python >= 3.11, pip, git, make and gcc. `make` alone lists the targets.

PYTHON ?= python3
ARGS ?=
VARIANT ?= gpu

BIN := .venv/bin
READY := .venv/.ready
PINS := constraints.txt

# Without .pyc files every process compiles torch, ray and deepspeed anew (30 s instead of 8 s to import them).
unexport PYTHONDONTWRITEBYTECODE
# None of these may steer pip, uv or Python away from .venv.
unexport PIP_USER PIP_TARGET PIP_PREFIX PYTHONHOME VIRTUAL_ENV
export UV_HTTP_TIMEOUT ?= 180
# uv brings its own list of certificate authorities; a company's own stands in the machine's.
ifneq ($(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem),)
export UV_SYSTEM_CERTS ?= true
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup quickstart test test-core test-ray test-smoke test-chaos gpu test-gpu image browser lint format constraints teachers clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# uv, not pip, installs: it resolves and unpacks faster, and it ignores PIP_FIND_LINKS, where a machine may offer
# another build of torch that does not fit the pinned torchvision (`operator torchvision::nms does not exist`).
# A mirror that pip is pointed at by PIP_INDEX_URL does hold for uv too.
setup: $(READY) ## create .venv with the pinned versions of everything; at once when nothing changed
$(READY): pyproject.toml $(PINS)
	@command -v $(PYTHON) >/dev/null || { echo "ddray needs Python 3.11 or newer, but there is no '$(PYTHON)'. Name another: make setup PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ddray needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1). Name another: make setup PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' cannot create virtual environments: its venv or ensurepip module is missing. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/uv --version >/dev/null 2>&1 || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS) uv; }
	@if [ -n "$$PIP_INDEX_URL" ]; then export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$PIP_INDEX_URL}"; fi; \
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --constraint $(PINS) --build-constraint $(PINS) --editable '.[dev]'
	@touch $@

quickstart: $(READY) ## teacher -> trajectories -> student -> report on the bundled digits; ARGS="--preset tiny"
	$(BIN)/ddray quickstart $(ARGS)

test: test-core test-ray ## the core tier, then the ray tier

test-core: $(READY) ## fast tests on the CPU, without Ray; ARGS="-k noise" goes to pytest
	$(BIN)/python -m pytest tests/core -n auto --maxprocesses 8 $(ARGS)

# Two processes, each with a Ray of its own: most of this tier waits for processes to start. So the slow ones of the
# core's tests are run beside it.
test-ray: $(READY) ## tests on a real local Ray, and the slow ones without
	$(BIN)/python -m pytest tests/runtime tests/core -m "(ray or slow) and not chaos" -n 2 --dist loadfile $(ARGS)

# pytest exits with 5 when it collected no test: for an optional tier that is no failure.
optional_tier = $(BIN)/python -m pytest -m "$(1)" $(ARGS) || { rc=$$?; [ $$rc -eq 5 ] || exit $$rc; echo "No $(1) tests here: nothing to run."; }

test-smoke: $(READY) ## of the slow tests the few that would catch most
	@$(call optional_tier,smoke)

test-chaos: $(READY) ## all slow tests: they kill workers and nodes, or drive a browser
	@$(call optional_tier,chaos)

gpu: ## what a GPU makes of ddray: right, then how fast; needs no .venv; ARGS=--quick
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py $(ARGS)

test-gpu: $(READY) ## tests that need a CUDA device
	@$(call optional_tier,gpu)

image: $(READY) ## build the image with Docker or buildah and try it; VARIANT=cpu; ARGS=--help
	PYTHONPATH=. $(BIN)/python -m cluster.image.build --variant $(VARIANT) $(ARGS)

browser: ## install Debian's chromium for the web page's test (as root; elsewhere it only says what is missing)
	@if command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  { timeout 120 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	    || echo "chromium could not be installed: the tests that need a browser will be skipped."; \
	else echo "chromium is missing: the tests that need a browser will be skipped."; fi

lint: $(READY) ## ruff, the formatter's check, mypy and codespell: what must pass before a commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ddray
	$(BIN)/codespell

format: $(READY) ## rewrite the code in the house format and fix what ruff can fix
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# Does not ask for $(READY): it is also the way out when pyproject.toml has moved past the pins.
constraints: ## pin what .venv holds now; upgrade there first: .venv/bin/uv pip install --upgrade NAME
	@$(BIN)/uv --version >/dev/null 2>&1 || { echo "There is no .venv to take the versions from: run 'make setup' first." >&2; exit 1; }
	@{ echo "# The versions that are tested together (CPython 3.11, Linux x86-64), each exact; pyproject.toml holds the lower bounds."; \
	echo "# Written by 'make constraints' from what .venv holds: upgrade there, run it, run the tests, commit the difference."; \
	$(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable | grep '^[A-Za-z0-9._-]*==' | grep -v '^pip==' | LC_ALL=C sort; } > $(PINS).new
	@mv $(PINS).new $(PINS)

teachers: $(READY) ## train the bundled digits teachers again
	$(BIN)/python jobs/train_digits_teacher.py $(ARGS)

clean: ## remove caches and build products; runs/ and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -path ./runs -prune -o -type d -name __pycache__ -exec rm -rf {} +
