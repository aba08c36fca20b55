# The image of a run: an NGC PyTorch image plus what pyproject.toml asks for. docs/clusters.md says how to use it.
#   docker build --build-arg REVISION=$(git rev-parse HEAD) -t nemo_vopd .
#
# Megatron-Core 0.19 and Megatron-Bridge 0.6 build and test on 26.06, with a newer Transformer Engine (2.17 or 2.18) of
# their own on top. This image keeps what 26.06 brings: Python 3.12, torch 2.13, CUDA 13.3 and Transformer Engine 2.16,
# which lies in the range that pyproject.toml states. Another one: --build-arg BASE=...
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE}
ARG BASE

# Dependencies first: this layer changes with these three files only, never with the source. keep_base.py writes down
# what must stay as the image built it (torch, numpy, Transformer Engine, apex, CUDA libraries) as pip constraints; they
# replace the image's own PIP_CONSTRAINT, which also holds packages that ours need in other versions. Megatron-Core
# cannot be imported beside an nvidia-resiliency-ext older than 0.6, as NGC images have brought it up to 26.04 at least. A
# run does without that package, so it is removed.
RUN --mount=type=bind,source=pyproject.toml,target=/tmp/build/pyproject.toml \
    --mount=type=bind,source=constraints.txt,target=/tmp/build/constraints.txt \
    --mount=type=bind,source=docker/keep_base.py,target=/tmp/build/keep_base.py \
    --mount=type=cache,target=/root/.cache/pip \
    python -m pip uninstall --yes --root-user-action=ignore nvidia-resiliency-ext \
    && python /tmp/build/keep_base.py /tmp/build/pyproject.toml /tmp/build/constraints.txt /opt/nemo_vopd_base \
    && PIP_CONSTRAINT='' PIP_CACHE_DIR=/root/.cache/pip python -m pip install --root-user-action=ignore \
        --requirement /opt/nemo_vopd_base/requirements.txt --constraint /opt/nemo_vopd_base/constraints.txt

# .dockerignore lets through what a run needs and nothing else
COPY . /opt/nemo_vopd

# Readable for every user id, whatever the umask of the checkout; /workspace is writable for every user id, as /tmp is.
# The check imports what a run imports and fails the build with the line that says what is wrong.
RUN --mount=type=cache,target=/root/.cache/pip \
    PIP_CONSTRAINT='' PIP_CACHE_DIR=/root/.cache/pip python -m pip install --root-user-action=ignore \
        --no-deps --editable /opt/nemo_vopd \
    && chmod -R a+rX /opt/nemo_vopd /opt/nemo_vopd_base \
    && mkdir -p /workspace && chmod 1777 /workspace \
    && python /opt/nemo_vopd/docker/check_image.py --base /opt/nemo_vopd_base/base.json

# last, because it changes with every commit
ARG REVISION=unknown
LABEL org.opencontainers.image.title="nemo_vopd" \
      org.opencontainers.image.description="Vision-OPD self-distillation of VLMs on NeMo and Megatron-Core" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"
ENV NEMO_VOPD_REVISION=${REVISION}

# The image's own entry point is not chained: its banner would stand in front of the JSON that plan and generate print.
# What it sets up for older drivers comes with every start of bash in these images, so with entrypoint.sh too.
WORKDIR /workspace
USER 1000:1000
ENTRYPOINT ["/opt/nemo_vopd/docker/entrypoint.sh"]
CMD ["help"]
