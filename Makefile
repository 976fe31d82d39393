# Every target sets up what it needs: a virtual environment in .venv with the pinned, hash-checked dependencies.
PYTHON  ?= python3
DATA    ?= ./data
SEEDS   ?= 1 2 3
PROFILE ?= embedded
ARGS    ?=
VENV    := .venv
RUN     := $(VENV)/bin/python

.DEFAULT_GOAL := help
DATASETS := cifar10 cifar100 mnist fashion_mnist
.PHONY: help setup test test-all lint format lock reproduce-afm reproduce-manifold-dividemix reproduce-me-momentum reproduce-sanm reproduce-sfa reproduce-all demo cross claims tables report speed check-gpu check-data $(DATASETS:%=data-%)

help:  ## list the targets
	@awk -F':[^#]*## ' '/^[a-z0-9_ -]+:.*## /{n = split($$1, names, " "); for (i = 1; i <= n; i++) printf "%-29s %s\n", names[i], $$2}' Makefile
	@echo
	@echo "variables: PROFILE=$(PROFILE) (embedded, short or paper)  DATA=$(DATA)  SEEDS=\"$(SEEDS)\"  ARGS=\"more flags\""

setup: $(VENV)/.ready  ## virtual environment with the pinned dependencies

$(VENV)/.ready: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is %d.%d: make PYTHON=/path/to/python3.12 ..." % sys.version_info[:2])'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.txt
	$(RUN) -m pip install --quiet --require-hashes --no-deps -r $(VENV)/uv.txt
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(RUN) --require-hashes -r requirements.lock
	@touch $@

test: setup  ## run the fast tests, a file at a time on each core
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: setup  ## run all tests: whole runs, killed runs and several processes too
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup  ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup  ## apply style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

demo: setup  ## from nothing: a folder of images with wrong labels, training, their ranking, and a gallery of the most suspect
	$(RUN) -m benchmarks.demo $(ARGS)

reproduce-afm: setup  ## Attentive Feature Mixup, mixup and cross-entropy: CSV, comparison, figure
	$(RUN) -m benchmarks.run afm --profile $(PROFILE) --data_path $(DATA) --seeds $(SEEDS) $(ARGS)

reproduce-manifold-dividemix: setup  ## Manifold DivideMix, parts of it left out, and cross-entropy: CSV, comparison, figure
	$(RUN) -m benchmarks.run manifold_dividemix --profile $(PROFILE) --data_path $(DATA) --seeds $(SEEDS) $(ARGS)

reproduce-me-momentum: setup  ## Me-Momentum and cross-entropy: CSV, comparison, figure
	$(RUN) -m benchmarks.run me_momentum --profile $(PROFILE) --data_path $(DATA) --seeds $(SEEDS) $(ARGS)

reproduce-sanm: setup  ## SANM on two bases, a base without masks, cross-entropy: CSV, comparison, figure
	$(RUN) -m benchmarks.run sanm --profile $(PROFILE) --data_path $(DATA) --seeds $(SEEDS) $(ARGS)

reproduce-sfa: setup  ## Stochastic Feature Averaging and cross-entropy: CSV, comparison, figure
	$(RUN) -m benchmarks.run sfa --profile $(PROFILE) --data_path $(DATA) --seeds $(SEEDS) $(ARGS)

reproduce-all: reproduce-afm reproduce-manifold-dividemix reproduce-me-momentum reproduce-sanm reproduce-sfa  ## every method there is

cross: setup  ## all methods and cross-entropy on the same images, labels, backbone and epochs
	$(RUN) -m benchmarks.cross --data_path $(DATA) --seeds $(SEEDS) $(ARGS)

claims: setup  ## what the papers claim and which of it holds: on digits, and on the data sets that DATA has
	$(RUN) -m benchmarks.claims --data_path $(DATA) $(ARGS)

tables: setup  ## write benchmarks/README.md and the tables of README.md
	$(RUN) -m benchmarks.tables $(ARGS)

report: setup  ## one HTML page of all results, measured and published, in results/report.html
	$(RUN) -m benchmarks.report $(ARGS)

data-cifar10 data-cifar100 data-mnist data-fashion_mnist: setup  ## download a data set to DATA (torchvision's copy, md5 checked)
	$(RUN) -m common.datasets download $(@:data-%=%) --data_path $(DATA)

check-gpu: setup  ## on a machine with a GPU: does it compute what a CPU computes, and how fast
	$(RUN) -m tests.check_gpu $(ARGS)

check-data: setup  ## look whether a data set is whole: make check-data ARGS="food101n --images" DATA=./data/food
	$(RUN) -m common.datasets check $(firstword $(ARGS)) --data_path $(DATA) $(wordlist 2, $(words $(ARGS)), $(ARGS))

speed: setup  ## measure training steps of every method beside a plain path, and reading and augmenting of images
	$(RUN) -m benchmarks.speed steps $(ARGS)
	$(RUN) -m benchmarks.speed images
	$(RUN) -m benchmarks.speed views

lock: setup  ## resolve the dependencies of pyproject.toml anew
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-find-links --extra dev pyproject.toml -o requirements.lock
