# `make` alone prints what there is. Nothing here needs root; everything lives in $(VENV).
VENV ?= .venv
# A pip requirement for PyTorch, options included, when neither the file in pip's find-links nor the index's own build is wanted.
TORCH ?=
# The Python to make $(VENV) with; the first new enough one of the usual names by default.
PYTHON ?=

bin := $(VENV)/bin
installed := $(VENV)/.installed
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help install demo test check static fuzz bench format proto images up down lock e2e e2e-k8s tamper

help: ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(installed) ## create .venv with everything for the demo, the tests and development

$(installed): pyproject.toml
	@VENV='$(VENV)' TORCH='$(TORCH)' PYTHON='$(PYTHON)' bash .ci/install
	@touch $@

demo: install ## train Fashion-MNIST on a whole local network: five services, 4 workers, two regions, mTLS
	@$(bin)/cortex demo

test: install ## all tests; they need neither root nor a container engine
	@$(bin)/python -m pytest

tamper: install ## change what is stored and sent in 100,000 ways: nothing of it may be believed; a minute
	@TAMPERINGS=100000 $(bin)/python -m pytest tests/tampering

check: static ## everything static, and the unit tests
	$(bin)/python -m pytest tests/unit tests/architecture

static: install ## format, ruff, mypy, import contracts, buf, generated code, security
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/mypy libs services
	$(bin)/lint-imports
	@PATH="$(abspath $(bin)):$$PATH" bash protos/check.sh
	@PATH="$(abspath $(bin)):$$PATH" bash .ci/security

fuzz: install ## every decoder that sees bytes from outside, a million inputs each from three engines: a night; FUZZ="frame --seconds 60"
	@$(bin)/python -c 'import atheris' 2>/dev/null || $(bin)/python -m pip install -qq --editable '.[fuzz]' || \
		echo '!!! NOT INSTALLED: there is no atheris for this Python or this system' >&2
	$(bin)/python -W ignore -m tests.fuzz $(FUZZ)

bench: install ## what a round costs, on this machine, beside Flower, NVFlare and Gloo: tables and plots; about an hour
	@$(bin)/python -c 'import matplotlib' 2>/dev/null || $(bin)/python -m pip install -qq --editable '.[bench]'
	@$(bin)/python -m benchmarks all

images: ## build the five container images: cortex/<service>:0.1.0
	@deploy/images

up: ## the same system by docker compose, images built if there are none: WORKERS=4, COMPOSE_PROFILES=grafana
	@deploy/up

down: ## stop what `make up` started; volumes stay
	@docker compose --file deploy/docker-compose.yml --file deploy/docker-compose.scale.yml --profile '*' down

e2e: install ## the whole system in containers: trained, killed, paused, cut off, rotated, upgraded (needs or installs Docker)
	@deploy/e2e/run

e2e-k8s: install ## the manifests on the cluster that KUBECONFIG names: a rolling update of everything during a job
	@$(bin)/python -m pytest -c deploy/e2e/pytest.ini deploy/e2e/test_kubernetes.py

lock: ## resolve the images' packages anew: deploy/requirements/*.txt
	@docker run --rm --volume "$(CURDIR):/src" python:3.11-slim-bookworm python /src/deploy/lock.py

format: install ## let ruff put the code in order
	$(bin)/ruff format .
	$(bin)/ruff check --fix .

proto: install ## generate libs/cortex_common/pb from protos/
	@PATH="$(abspath $(bin)):$$PATH" bash protos/generate.sh python
