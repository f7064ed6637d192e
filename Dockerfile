# The image of the worker. Two targets:
#   baked (the default)  contains the weights of MODEL_ID; it starts without a network
#   slim                 contains no weights: they come from a network volume or from the platform's model cache
#
#   docker build --build-arg MODEL_ID=wan22_14b_t2v --secret id=HF_TOKEN,env=HF_TOKEN -t worker-wan-lora:wan22_14b_t2v .
#   docker build --build-arg QUANTIZE=qfloat8 …      the weights as codes, for a smaller GPU: half the size, and other frames
#   docker build --build-arg CHECKPOINTS=tiny -t worker-wan-lora:tiny .      random weights of a few MB, to try the image
#
# docs/deploy.md explains how to publish one; docker-bake.hcl has a target for each model. There are no heredocs and no
# COPY --link, so that buildah of Debian 12 can build it too.

# Any Debian or Ubuntu with Python 3.11 or newer. It needs no CUDA: torch's own packages contain the CUDA libraries that they
# were tested with, and would ignore those of the base image, which add 2 GB and more. The driver comes from the host.
ARG BASE_IMAGE=debian:bookworm-slim
# 1980-01-01: the modification time of every file, so that the same content makes the same layer. As in builder/__init__.py.
ARG REPRODUCIBLE_MTIME=315532800
# A format of the worker's variable QUANTIZE: `baked` then contains the weights as its codes, and has the variable set.
ARG QUANTIZE=""


FROM ${BASE_IMAGE} AS base
# python3-venv (8 MB) contains pip for the layers below.
# Debian's packages are not pinned: its archive keeps only the latest version of a release, which has the security fixes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/apt /var/log/*.log


# Tools for the build. The image contains none of them.
FROM base AS tools
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates git && rm -rf /var/lib/apt/lists/*
COPY builder/requirements-fetch.txt /build/
RUN python3 -m venv /tools && /tools/bin/python -m pip install --no-cache-dir -r /build/requirements-fetch.txt
ENV PATH=/tools/bin:$PATH


FROM base AS runtime
ARG REPRODUCIBLE_MTIME
# The NVIDIA container toolkit reads the NVIDIA variables; CUDA base images set the same. The worker sends no requests to the Hub.
ENV PATH=/opt/venv/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    PYTORCH_ALLOC_CONF=expandable_segments:True,pinned_max_round_threshold_mb:1 \
    CHECKPOINT_DIR=/checkpoints \
    AI_TOOLKIT_PATH=/opt/ai-toolkit
# torch comes first and alone, since it is by far the largest package and changes least often. PyPI has the CUDA build, with the
# nvidia packages; with pip configured to an index with a CPU build, the image is for CPUs.
# The lists stay in the image, as a record of what is installed.
COPY builder/constraints.txt builder/requirements-torch.txt /opt/venv/
RUN --mount=type=bind,source=builder/install.sh,target=/tmp/install.sh sh /tmp/install.sh /opt/venv/requirements-torch.txt
COPY builder/requirements.txt /opt/venv/
RUN --mount=type=bind,source=builder/install.sh,target=/tmp/install.sh sh /tmp/install.sh /opt/venv/requirements.txt
WORKDIR /app
# Python is process 1, so that it receives SIGTERM: the worker then finishes its job and exits. It runs as root, since RunPod's
# network volumes belong to root, and the worker writes LoRAs and results to them.
CMD ["python3", "-u", "/app/handler.py"]


FROM tools AS toolkit
ARG CHECKPOINTS=hub
ARG AI_TOOLKIT_REMOTE=""
ARG AI_TOOLKIT_COMMIT=""
ARG REPRODUCIBLE_MTIME
COPY builder/__init__.py builder/retry.py builder/fetch_toolkit.py /build/builder/
COPY pipelines/__init__.py pipelines/catalog.py /build/pipelines/
COPY worker/__init__.py worker/files.py /build/worker/
WORKDIR /build
# Tiny images are built without a network: they get ai-toolkit only when AI_TOOLKIT_REMOTE is set.
RUN mkdir -p /opt/ai-toolkit \
    && if [ "$CHECKPOINTS" = hub ] || [ -n "$AI_TOOLKIT_REMOTE" ]; then \
       python3 -m builder.fetch_toolkit --to /opt/ai-toolkit ${AI_TOOLKIT_REMOTE:+--remote "$AI_TOOLKIT_REMOTE"} \
       ${AI_TOOLKIT_COMMIT:+--commit "$AI_TOOLKIT_COMMIT"}; fi \
    && find /opt/ai-toolkit -exec touch -h -d "@$REPRODUCIBLE_MTIME" {} +


FROM runtime AS tiny
ARG CHECKPOINTS=hub
COPY builder/__init__.py builder/tiny_checkpoints.py /build/builder/
COPY pipelines/__init__.py pipelines/catalog.py /build/pipelines/
WORKDIR /build
RUN mkdir /tiny && if [ "$CHECKPOINTS" = tiny ]; then python3 -m builder.tiny_checkpoints /tiny; fi


# What downloads weights: without torch, so that weights are not downloaded again when a package of the worker changes.
FROM tools AS fetch


# Codes are made with torch.
FROM runtime AS fetch_codes
COPY builder/quantize.py /build/builder/
COPY pipelines/pristine.py pipelines/quantized.py pipelines/reading.py pipelines/trained.py /build/pipelines/


# One step per group: when the network fails, only that group is downloaded again. No layer contains the token.
# The name is that of a stage above.
# hadolint ignore=DL3006
FROM fetch${QUANTIZE:+_codes} AS checkpoints
ARG QUANTIZE
ARG MODEL_ID=wan21_1b
ARG CHECKPOINTS=hub
ARG REVISIONS=""
# bf16 halves the float32 weights of Wan 2.1 and of 5B, and changes no bit of a frame on a GPU; original keeps the Hub's files.
# With QUANTIZE, what has no codes is in bf16.
ARG WEIGHTS_DTYPE=bf16
# The Hub, or a mirror of it.
ARG HF_ENDPOINT=https://huggingface.co
COPY builder/__init__.py builder/retry.py builder/hub.py builder/checkpoint_folder.py builder/convert.py \
     builder/fetch_checkpoints.py builder/bake.py /build/builder/
COPY pipelines/__init__.py pipelines/catalog.py pipelines/manifest.py pipelines/safetensors_header.py \
     pipelines/weights.py /build/pipelines/
COPY worker/__init__.py worker/files.py /build/worker/
COPY worker/net/__init__.py worker/net/statuses.py /build/worker/net/
WORKDIR /build
RUN mkdir /checkpoints /weights
RUN --mount=type=secret,id=HF_TOKEN [ "$CHECKPOINTS" = tiny ] \
    || python3 -m builder.bake text --model-id "$MODEL_ID" --revisions "$REVISIONS" --dtype "$WEIGHTS_DTYPE" --quantize "$QUANTIZE"
RUN --mount=type=secret,id=HF_TOKEN [ "$CHECKPOINTS" = tiny ] \
    || python3 -m builder.bake vae --model-id "$MODEL_ID" --revisions "$REVISIONS" --dtype "$WEIGHTS_DTYPE" --quantize "$QUANTIZE"
RUN --mount=type=secret,id=HF_TOKEN [ "$CHECKPOINTS" = tiny ] \
    || python3 -m builder.bake image --model-id "$MODEL_ID" --revisions "$REVISIONS" --dtype "$WEIGHTS_DTYPE" --quantize "$QUANTIZE"
RUN --mount=type=secret,id=HF_TOKEN [ "$CHECKPOINTS" = tiny ] \
    || python3 -m builder.bake transformer --model-id "$MODEL_ID" --revisions "$REVISIONS" --dtype "$WEIGHTS_DTYPE" --quantize "$QUANTIZE"
RUN --mount=type=secret,id=HF_TOKEN [ "$CHECKPOINTS" = tiny ] \
    || python3 -m builder.bake transformer_2 --model-id "$MODEL_ID" --revisions "$REVISIONS" --dtype "$WEIGHTS_DTYPE" --quantize "$QUANTIZE"
# DRAFT=1: the distilled LoRAs too, with which `draft` works without a volume.
ARG DRAFT=0
RUN --mount=type=secret,id=HF_TOKEN [ "$CHECKPOINTS" = tiny ] || [ "$DRAFT" = 0 ] \
    || python3 -m builder.bake draft --model-id "$MODEL_ID" --revisions "$REVISIONS"
COPY --from=tiny /tiny /tiny
RUN [ "$CHECKPOINTS" = hub ] \
    || python3 -m builder.bake all --model-id "$MODEL_ID" --from /tiny


# The code, its bytecode, and the index of models that transformers makes at its first import and
# worker/startup/lean_imports.py stores.
FROM runtime AS code
ARG REPRODUCIBLE_MTIME
COPY LICENSE handler.py /image/app/
# These modules download weights: at start where ALLOW_DOWNLOAD is set, or by hand to a network volume.
COPY builder/__init__.py builder/retry.py builder/hub.py builder/checkpoint_folder.py builder/convert.py \
     builder/quantize.py builder/fetch_checkpoints.py /image/app/builder/
COPY pipelines /image/app/pipelines
COPY worker /image/app/worker
WORKDIR /
RUN PYTHONHASHSEED=0 python3 -S -m compileall -q --invalidation-mode unchecked-hash /image/app \
    && PYTHONPATH=/image/app python3 -c "from worker.startup import lean_imports; lean_imports.install(); import transformers" \
    && cp -a --parents opt/venv/lib/python3*/site-packages/transformers/models/__pycache__/index.*.marshal /image \
    && find /image -exec touch -h -d "@$REPRODUCIBLE_MTIME" {} +


FROM runtime AS slim
ARG COMPILE=0
# COMPILE=1 also sets the worker's variable COMPILE. At run time Triton needs a C compiler and Python's headers, and Inductor a
# C++ compiler for what it computes on the CPU.
# hadolint ignore=DL3008
RUN if [ "$COMPILE" = 1 ]; then apt-get update && apt-get install -y --no-install-recommends g++ libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*; fi
COPY --from=toolkit /opt/ai-toolkit /opt/ai-toolkit
# Empty: the image serves any model, and MODEL_ID is set at run time.
ARG MODEL_ID=""
ARG AI_TOOLKIT_COMMIT=""
ENV MODEL_ID=$MODEL_ID \
    AI_TOOLKIT_COMMIT=$AI_TOOLKIT_COMMIT \
    COMPILE=$COMPILE
ARG VERSION=dev
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="worker-wan-lora" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$COMMIT
COPY --from=code /image /


FROM runtime AS baked
# A group that the model does not have makes an empty layer. builder/bake.py says how many slots a group has.
COPY --from=checkpoints /weights/text/0 /weights/text/0
COPY --from=checkpoints /weights/text/1 /weights/text/1
COPY --from=checkpoints /weights/text/2 /weights/text/2
COPY --from=checkpoints /weights/vae /weights/vae
COPY --from=checkpoints /weights/image /weights/image
COPY --from=checkpoints /weights/transformer/0 /weights/transformer/0
COPY --from=checkpoints /weights/transformer/1 /weights/transformer/1
COPY --from=checkpoints /weights/transformer/2 /weights/transformer/2
COPY --from=checkpoints /weights/transformer/3 /weights/transformer/3
COPY --from=checkpoints /weights/transformer/4 /weights/transformer/4
COPY --from=checkpoints /weights/transformer/5 /weights/transformer/5
COPY --from=checkpoints /weights/transformer/6 /weights/transformer/6
COPY --from=checkpoints /weights/transformer_2/0 /weights/transformer_2/0
COPY --from=checkpoints /weights/transformer_2/1 /weights/transformer_2/1
COPY --from=checkpoints /weights/transformer_2/2 /weights/transformer_2/2
COPY --from=checkpoints /weights/transformer_2/3 /weights/transformer_2/3
COPY --from=checkpoints /checkpoints /checkpoints
ARG COMPILE=0
# hadolint ignore=DL3008
RUN if [ "$COMPILE" = 1 ]; then apt-get update && apt-get install -y --no-install-recommends g++ libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*; fi
COPY --from=toolkit /opt/ai-toolkit /opt/ai-toolkit
ARG MODEL_ID=wan21_1b
ARG AI_TOOLKIT_COMMIT=""
ARG QUANTIZE
ENV MODEL_ID=$MODEL_ID \
    AI_TOOLKIT_COMMIT=$AI_TOOLKIT_COMMIT \
    COMPILE=$COMPILE \
    QUANTIZE=$QUANTIZE
ARG REVISIONS=""
ARG VERSION=dev
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="worker-wan-lora" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$COMMIT
COPY --from=code /image /
