# make run    sets up, lays out tiny trained checkpoints and runs test_input.json to a playable MP4; MODEL=id takes another model
# make test   sets up and runs the tests: three files at once, since many tests wait, and in their order, since the longest must not
#             come last
# make soak   500 jobs with every fault there is; takes ten minutes and more
# make serve  the local RunPod API on port 8000, with the same tiny model; MODEL=id
# make image-test   builds the image with tiny checkpoints, looks through its layers, and runs a job in it; needs root and buildah
# make openapi-clients   generates clients of docs/openapi.json in Python and TypeScript, and uses them; needs npm and the network
# make lint   ruff, mypy, hadolint and shellcheck
# make docs   rewrites the generated parts of the documentation and builds it as a site
# make playground   a page to try it with: for that model, URL=http://… or ENDPOINT=id

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
DEMO := .demo
MODEL ?= wan22_14b_t2v

.PHONY: setup run serve playground test image-test soak openapi-clients lint format docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: builder/requirements-torch.txt builder/requirements.txt builder/requirements-dev.txt builder/requirements-docs.txt builder/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --no-compile -r builder/requirements-torch.txt -c builder/constraints.txt
	$(PY) -m pip install --quiet --no-compile -r builder/requirements.txt -r builder/requirements-dev.txt -c builder/constraints.txt
	$(PY) -m compileall -qq -j 0 $(VENV)/lib || true  # on all cores, which pip does not; packages hold files for other versions
	touch $@

$(DEMO)/.ready: $(wildcard builder/demo/weights/*.safetensors builder/demo/weights/*/* builder/demo/trained/*/*) builder/demo/install.py builder/demo/image_to_video.py builder/tiny_checkpoints.py pipelines/catalog.py $(VENV)/.ready
	$(PY) -m builder.demo.install $(DEMO)
	touch $@

run: $(DEMO)/.ready
	$(PY) -m builder.demo.run $(DEMO) --model-id $(MODEL)

serve: $(DEMO)/.ready
	MODEL_ID=$(MODEL) CHECKPOINT_DIR=$(DEMO) LORA_DIR=$(DEMO)/loras DEVICE=cpu OUTPUT_DIR=output $(PY) handler.py --rp_serve_api

playground: $(DEMO)/.ready
	$(PY) -m playground $(if $(ENDPOINT),--endpoint $(ENDPOINT),$(if $(URL),--url $(URL),--tiny $(DEMO)))

test: setup
	$(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

image-test: setup
	IMAGE_TEST=1 $(PY) -m pytest tests/image -s

soak: setup
	$(PY) -m tests.soak --jobs 500

openapi-clients: $(DEMO)/.ready
	$(PY) -m tests.openapi_clients $(DEMO)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/hadolint Dockerfile
	$(VENV)/bin/shellcheck .ci/run builder/install.sh

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: setup
	$(PY) -m docs.generate
	$(PY) -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(DEMO) output site
