# syntax=docker/dockerfile:1
# A trainer, or the control plane:
#   docker build -t gradwire .                        CPU
#   docker build -t gradwire --build-arg DEVICE=cuda .
#   docker run --rm -p 7777:7777 -e GRADWIRE_API_KEY=… -v gradwire:/data [--gpus all] gradwire \
#       serve --listen 0.0.0.0:7777 --base-model HuggingFaceTB/SmolLM2-135M-Instruct
# /data holds checkpoints and the hub's cache. For the control plane (`jobs --listen 0.0.0.0:7070`) set
# GRADWIRE_HEALTH_ADDRESS=127.0.0.1:7070 and GRADWIRE_HEALTH_SERVICE=gradwire.v1.TrainerJobService. A server that speaks
# TLS is asked on a port of its own: --health-listen 127.0.0.1:7776, GRADWIRE_HEALTH_ADDRESS=127.0.0.1:7776.
# scripts/check_dockerfile.py runs the steps that need no Docker engine.

# By its digest, an index of all architectures; the tag is for people. To renew: docker buildx imagetools inspect TAG
ARG PYTHON=python:3.12.15-slim-bookworm@sha256:54c85f3c47607a77f32adec749d3c81d1348bf25833671f512b26a9b6d778cb3

# ── What others wrote, pinned: changes only when constraints.txt or the dependencies do ────────────────────────────────
FROM ${PYTHON} AS dependencies
ARG DEVICE=cpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python -m venv --without-pip /opt/gradwire
COPY constraints.txt ./
# PyPI's torch for Linux carries CUDA; PyTorch's own index has one without, gigabytes smaller.
RUN case "$DEVICE" in \
      cpu) set -- --extra-index-url https://download.pytorch.org/whl/cpu ;; \
      cuda) set -- ;; \
      *) echo "DEVICE is '$DEVICE'; it must be cpu or cuda." >&2; exit 1 ;; \
    esac; \
    pip --python /opt/gradwire/bin/python install --constraint constraints.txt "$@" \
      "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = p['optional-dependencies']; \
print(*p['dependencies'], *extras['server'], *extras['s3'], *extras['kubernetes'], *extras['gateway'], sep='\n')" > requirements.txt; \
    pip --python /opt/gradwire/bin/python install --constraint constraints.txt --requirement requirements.txt; \
    find /opt/gradwire -name __pycache__ -type d -prune -exec rm -rf {} +

# ── What we wrote ─────────────────────────────────────────────────────────────────────────────────────────────────────
FROM ${PYTHON} AS gradwire
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt ./
RUN pip install --constraint constraints.txt hatchling
COPY pyproject.toml README.md ./
COPY sdk sdk
COPY trainer_service trainer_service
RUN pip install --no-deps --no-build-isolation --no-compile --target /opt/app .

# ── The image ─────────────────────────────────────────────────────────────────────────────────────────────────────────
FROM ${PYTHON}
# tini reaps the processes that ranks leave when they are killed, and hands signals on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && python -m pip uninstall --yes --quiet --root-user-action ignore pip \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin gradwire \
    && install --directory --owner gradwire --group gradwire /data
COPY --from=dependencies /opt/gradwire /opt/gradwire
COPY --from=gradwire /opt/app /opt/app
COPY scripts/healthcheck.py /opt/healthcheck.py
ENV PATH=/opt/gradwire/bin:$PATH \
    PYTHONPATH=/opt/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    GRADWIRE_HOME=/data \
    HF_HOME=/data/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# By number, so that a cluster can tell that it is not root.
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 7777 7070
# Loading a large model takes its time; within it only a yes counts.
HEALTHCHECK --interval=10s --timeout=6s --start-period=30m --retries=3 CMD ["python", "/opt/healthcheck.py"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "python", "-m", "trainer_service"]
CMD ["--help"]
