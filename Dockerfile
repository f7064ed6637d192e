# The worker as an image. Two targets:
#   baked (the default)  with the weights of MODEL_ID inside; it starts without a network
#   slim                 without weights: they come from a network volume or from the platform's cache of models
#
#   docker build --build-arg MODEL_ID=wan22_14b_t2v --secret id=HF_TOKEN,env=HF_TOKEN -t worker-wan-lora:wan22_14b_t2v .
#   docker build --build-arg CHECKPOINTS=tiny -t worker-wan-lora:tiny .      random weights of a few MB, to try the image out
#
# docs/deploy.md tells how to publish one, docker-bake.hcl has a target for each model. No heredocs and no COPY --link: buildah
# of Debian 12 builds it too.

# Any Debian or Ubuntu with Python 3.11 or newer. None with CUDA inside: torch's own packages bring the CUDA libraries they were
# tested with, and would not use a base's, which weighs another 2 GB and more. The driver comes from the host.
ARG BASE_IMAGE=debian:bookworm-slim


FROM ${BASE_IMAGE} AS base
# python3-venv brings pip for the layers below, in 8 MB.
# Versions of Debian's packages are not pinned: its archive keeps only the latest of a release, and that is the one to have.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/apt /var/log/*.log


# What only builds. None of it gets into the image.
FROM base AS tools
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates git && rm -rf /var/lib/apt/lists/*
COPY builder/requirements-fetch.txt /build/
RUN python3 -m venv /tools && /tools/bin/python -m pip install --no-cache-dir -r /build/requirements-fetch.txt


FROM base AS runtime
# For whoever runs it with the NVIDIA container toolkit, as CUDA base images do. Nothing is asked of the Hub at run time.
ENV PATH=/opt/venv/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    CHECKPOINT_DIR=/checkpoints \
    AI_TOOLKIT_PATH=/opt/ai-toolkit
# torch is by far the largest, and changes least often: first and alone. From PyPI it is the build for CUDA, and brings the
# nvidia packages; where pip is configured to another index with a CPU build, the image is for CPUs.
# The lists stay in the image, as the record of what is installed.
COPY builder/constraints.txt builder/requirements-torch.txt /opt/venv/
RUN --mount=type=bind,source=builder/install.sh,target=/tmp/install.sh sh /tmp/install.sh /opt/venv/requirements-torch.txt
COPY builder/requirements.txt /opt/venv/
RUN --mount=type=bind,source=builder/install.sh,target=/tmp/install.sh sh /tmp/install.sh /opt/venv/requirements.txt
WORKDIR /app
# Python is process 1, and SIGTERM reaches it: the worker finishes its job, and leaves. As root: RunPod mounts a network volume
# that belongs to root, and the worker keeps LoRAs and results on it.
CMD ["python3", "-u", "/app/handler.py"]


FROM tools AS toolkit
ARG CHECKPOINTS=hub
ARG AI_TOOLKIT_REMOTE=""
ARG AI_TOOLKIT_COMMIT=""
COPY builder/__init__.py builder/fetch_toolkit.py /build/builder/
COPY pipelines/__init__.py pipelines/catalog.py /build/pipelines/
WORKDIR /build
# Tiny images are made without a network: they get it only from a remote that is named.
RUN mkdir -p /opt/ai-toolkit \
    && if [ "$CHECKPOINTS" = hub ] || [ -n "$AI_TOOLKIT_REMOTE" ]; then \
       /tools/bin/python -m builder.fetch_toolkit --to /opt/ai-toolkit ${AI_TOOLKIT_REMOTE:+--remote "$AI_TOOLKIT_REMOTE"} \
       ${AI_TOOLKIT_COMMIT:+--commit "$AI_TOOLKIT_COMMIT"}; fi \
    && find /opt/ai-toolkit -exec touch -h -d @315532800 {} +


FROM runtime AS tiny
ARG CHECKPOINTS=hub
COPY builder/tiny_checkpoints.py /build/
RUN mkdir /tiny && if [ "$CHECKPOINTS" = tiny ]; then python3 /build/tiny_checkpoints.py /tiny; fi


# One step per group: when the network breaks, only that group is fetched again. The token is in none of the layers.
FROM tools AS checkpoints
ARG MODEL_ID=wan21_1b
ARG CHECKPOINTS=hub
ARG REVISIONS=""
# A mirror of the Hub, where there is one.
ARG HF_ENDPOINT=https://huggingface.co
COPY builder/__init__.py builder/hub.py builder/fetch_checkpoints.py builder/bake.py /build/builder/
COPY pipelines/__init__.py pipelines/catalog.py pipelines/manifest.py pipelines/weights.py /build/pipelines/
COPY worker/__init__.py /build/worker/
COPY worker/net/__init__.py worker/net/statuses.py /build/worker/net/
WORKDIR /build
RUN mkdir /checkpoints /weights
RUN --mount=type=secret,id=HF_TOKEN [ "$CHECKPOINTS" = tiny ] \
    || /tools/bin/python -m builder.bake text --model-id "$MODEL_ID" --revisions "$REVISIONS"
RUN --mount=type=secret,id=HF_TOKEN [ "$CHECKPOINTS" = tiny ] \
    || /tools/bin/python -m builder.bake vae --model-id "$MODEL_ID" --revisions "$REVISIONS"
RUN --mount=type=secret,id=HF_TOKEN [ "$CHECKPOINTS" = tiny ] \
    || /tools/bin/python -m builder.bake image --model-id "$MODEL_ID" --revisions "$REVISIONS"
RUN --mount=type=secret,id=HF_TOKEN [ "$CHECKPOINTS" = tiny ] \
    || /tools/bin/python -m builder.bake transformer --model-id "$MODEL_ID" --revisions "$REVISIONS"
RUN --mount=type=secret,id=HF_TOKEN [ "$CHECKPOINTS" = tiny ] \
    || /tools/bin/python -m builder.bake transformer_2 --model-id "$MODEL_ID" --revisions "$REVISIONS"
COPY --from=tiny /tiny /tiny
RUN [ "$CHECKPOINTS" = hub ] \
    || /tools/bin/python -m builder.bake all --model-id "$MODEL_ID" --from /tiny


# The code, its bytecode, and an index of all models that transformers makes at its first import and worker/startup/lean_imports.py keeps.
FROM runtime AS code
COPY LICENSE handler.py /image/app/
# The worker fetches weights with it where ALLOW_DOWNLOAD is set, and who fills a network volume by hand.
COPY builder/__init__.py builder/hub.py builder/fetch_checkpoints.py /image/app/builder/
COPY pipelines /image/app/pipelines
COPY worker /image/app/worker
WORKDIR /
RUN PYTHONHASHSEED=0 python3 -S -m compileall -q --invalidation-mode unchecked-hash /image/app \
    && PYTHONPATH=/image/app python3 -c "from worker.startup import lean_imports; lean_imports.install(); import transformers" \
    && cp -a --parents opt/venv/lib/python3*/site-packages/transformers/models/__pycache__/index.*.marshal /image \
    && find /image -exec touch -h -d @315532800 {} +


FROM runtime AS slim
ARG COMPILE=0
# Only for the worker's setting COMPILE, which it turns on: Triton needs a C compiler and Python's headers at run time, and
# Inductor a C++ one for what it computes on the CPU.
# hadolint ignore=DL3008
RUN if [ "$COMPILE" = 1 ]; then apt-get update && apt-get install -y --no-install-recommends g++ libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*; fi
COPY --from=toolkit /opt/ai-toolkit /opt/ai-toolkit
# Not given: the one image serves any model, and MODEL_ID is set at run time.
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
# What is empty for a model makes an empty layer. The sizes of the slots: builder/bake.py.
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
ENV MODEL_ID=$MODEL_ID \
    AI_TOOLKIT_COMMIT=$AI_TOOLKIT_COMMIT \
    COMPILE=$COMPILE
ARG REVISIONS=""
ARG VERSION=dev
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="worker-wan-lora" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$COMMIT
COPY --from=code /image /
