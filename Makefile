# `make` alone says what there is. Nothing here but GNU make (3.81 is enough) and Python 3.11 to 3.13 is needed.

SCALE    = small
DATASET  =
DATA_DIR =
EXTRA    =
CHAPTER  =
FORCE    =
CONFIRM  =
PYTHON   =

BIN   = .venv/bin
BOOK  = $(BIN)/python tools/book.py
FORCED  = $(if $(FORCE),--force)
FETCH_UV = command -v uv >/dev/null || [ -x build/uv/bin/uv ] || \
    { python3 -m venv build/uv && build/uv/bin/python -m pip install --quiet uv; }
COMPILE = PATH="$$PATH:$(CURDIR)/build/uv/bin" uv pip compile pyproject.toml --universal --quiet \
    --python-version 3.11 --generate-hashes --no-emit-index-url --no-header
OPTIONS = --scale '$(SCALE)' --dataset '$(DATASET)' --data-dir '$(DATA_DIR)' --extra '$(EXTRA)' $(FORCED)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help book test plan rehearse bench serving serve doctor lab sync lint check pytest lock lock-tpu clean clean-cloud

help:  ## this list
	@sed -n 's/^\([a-zN%-]*\):[^#]*##  *\(.*\)/  make \1|\2/p' Makefile | sed 's/%/N/' | awk -F'|' '{printf "%-20s%s\n", $$1, $$2}'
	@echo
	@echo "  SCALE=small|medium|full   DATASET=ml-1m   DATA_DIR=folder   EXTRA=\"batch_size=8192 epochs=3\""
	@echo "  CHAPTER=N   FORCE=1 (run what is unchanged too)   PYTHON=python3.12 (to make .venv with)"

book: .venv/installed  ## run every chapter (those that changed) and print seconds and memory
	@$(BOOK) run $(CHAPTER) $(OPTIONS)

test: export TESTS_STARTED := $(shell date +%s)
test: lint check pytest  ## everything: lint, every chapter against its committed outputs, the tests

chapter-%: .venv/installed  ## one chapter, into runs/SCALE/chapter-N.ipynb
	@$(BOOK) run $* $(OPTIONS)

plan: .venv/installed  ## what a full run will do and cost; nothing is paid for
	@$(BIN)/python -m recsys_common.costs $(if $(CHAPTER),--chapter $(CHAPTER)) \
	    --table '$(DATASET)' --project '$(PROJECT)'

rehearse: .venv/installed  ## the full path here, without an account: make rehearse CHAPTER=1
	@$(BOOK) rehearse $(CHAPTER) --dataset '$(DATASET)' --data-dir '$(DATA_DIR)' --extra '$(EXTRA)' $(FORCED)

bench: .venv/installed  ## measure what the texts quote: make bench DATA_DIR=folder
	@for script in benchmarks/[!_]*.py; do echo "$$script"; $(BIN)/python "$$script" $(if $(DATA_DIR),--data-dir '$(DATA_DIR)') || exit 1; done

serving: build/serving/built  ## the clients in C and Node.js, into build/serving

serve: .venv/installed  ## recommendations over HTTP: make serve MODEL=folder PORT=8000
	@$(if $(MODEL),,echo "which model? make serve MODEL=folder" && exit 1;) \
	$(BIN)/python serving/service.py '$(MODEL)' $(if $(PORT),--port $(PORT))

doctor: .venv/installed  ## is this machine ready, and for which scale?
	@$(BIN)/python -m recsys_common.doctor

lab: .venv/installed  ## JupyterLab on the chapters
	@$(BIN)/python -m jupyter lab --notebook-dir=chapters

sync: .venv/installed  ## chapters/N_name.py -> N_name.ipynb, executed at the small scale
	@$(BOOK) sync $(CHAPTER) $(FORCED)

check: .venv/installed  ## execute the committed notebooks and compare their outputs
	@$(BOOK) check $(CHAPTER) $(FORCED)

pytest: .venv/installed  ## the tests alone; they read the metrics that check leaves
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: .venv/installed  ## ruff's rules and format, chapters included
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet .

lock:  ## requirements.txt anew from pyproject.toml; uv is fetched into build/ if there is none
	@$(FETCH_UV)
	$(COMPILE) --extra test -o requirements.txt

lock-tpu:  ## requirements-tpu.txt, of TPU machines: TensorFlow 2.20, and what it can of requirements.txt
	@$(FETCH_UV) && mkdir -p build && cp requirements.txt build/requirements-tpu.txt
	$(COMPILE) --extra tpu --no-emit-package tensorflow -o build/requirements-tpu.txt
	mv build/requirements-tpu.txt requirements-tpu.txt

clean:  ## remove what runs and builds left (.venv and data/ stay)
	rm -rf runs build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find chapters recsys_common tests tools -name __pycache__ -prune -exec rm -rf {} +

clean-cloud: .venv/installed  ## list what is ours in BUCKET=name (PROJECT=name for its tables); CONFIRM=1 deletes it
	@$(BIN)/python -m recsys_common.cleanup --bucket '$(BUCKET)' --project '$(PROJECT)' $(if $(filter 1,$(CONFIRM)),--confirm)

build/serving/built: .venv/installed tools/serving.sh $(wildcard serving/*.c serving/*.h serving/*.mjs serving/package*.json)
	@sh tools/serving.sh

# Nothing is installed twice, and an install that was cut short is not taken for whole: the file comes last.
.venv/installed: requirements.txt pyproject.toml
	@sh tools/environment.sh $(PYTHON)
