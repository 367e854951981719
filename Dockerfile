# sampo as an image; its entry point is the command `sampo`. docs/install.md has examples.
#
#   docker build -t sampo .
#   docker build -t sampo:deepspeed --build-arg EXTRAS=deepspeed,report --build-arg BASE_IMAGE=nvidia/cuda:TAG .
#
# BASE_IMAGE  an image of Debian or Ubuntu, with Python 3.11 or newer, or with that in its package sources. The wheels of
#             torch hold the CUDA libraries, so the default serves CPUs and GPUs. DeepSpeed compiles its extensions with
#             nvcc: take a `devel` image of the CUDA version that `torch.version.cuda` states, such as
#             nvidia/cuda:TAG-devel-ubuntu24.04.
# EXTRAS      extras of the package
# PIP_ARGS    further arguments of pip, for example an index with CPU wheels of torch, or a mirror
ARG BASE_IMAGE=python:3.12-slim
FROM ${BASE_IMAGE}

# A C++ compiler: Triton and DeepSpeed need one when they run.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
        $(command -v python3 > /dev/null || echo python3-dev python3-venv) \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/sampo
ENV PATH=/opt/sampo/bin:$PATH

ARG PIP_ARGS=""
WORKDIR /opt/sampo/src
# torch first: the layer with its gigabytes stays when the code changes
COPY constraints.txt ./
RUN pip install --no-cache-dir ${PIP_ARGS} -c constraints.txt torch

ARG EXTRAS=report
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY sampo ./sampo
COPY recipes ./recipes
COPY configs ./configs
RUN pip install --no-cache-dir ${PIP_ARGS} -c constraints.txt ".[${EXTRAS}]"

# Any user may run it, so that files in mounted folders belong to the caller (`docker run --user`).
RUN mkdir -m 1777 /cache /work
ENV HOME=/cache USER=sampo HF_HOME=/cache/huggingface SAMPO_CACHE=/cache/sampo
USER 10001
WORKDIR /work
ENTRYPOINT ["sampo"]
CMD ["--help"]
