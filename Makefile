# make run    sets up, builds tiny checkpoints and runs test_input.json to a playable MP4
# make test   sets up and runs the tests
# make lint   ruff and mypy

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
TINY := .tiny

.PHONY: setup run test lint format schema clean

setup: $(VENV)/.ready

$(VENV)/.ready: builder/requirements-torch.txt builder/requirements.txt builder/requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r builder/requirements-torch.txt
	$(PY) -m pip install --quiet -r builder/requirements.txt -r builder/requirements-dev.txt
	touch $@

$(TINY)/.ready: builder/tiny_checkpoints.py $(VENV)/.ready
	$(PY) builder/tiny_checkpoints.py $(TINY)
	touch $@

run: $(TINY)/.ready
	MODEL_ID=wan22_14b_t2v CHECKPOINT_DIR=$(TINY) LORA_DIR=$(TINY)/loras DEVICE=cpu OUTPUT_DIR=output $(PY) handler.py
	@echo "the video: $(CURDIR)/output/local_test/0.mp4"

test: setup
	$(PY) -m pytest

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

schema: setup
	$(PY) -m docs.generate

clean:
	rm -rf $(VENV) $(TINY) output
