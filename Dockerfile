# syntax=docker/dockerfile:1

# docker build -t rankwise .                              a CPU image
# docker build -t rankwise:cuda --build-arg TORCH=cu130 . a CUDA image (run with --gpus all)
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS builder
# The folder of PyTorch's own index that torch comes from: "cpu", or a CUDA version such as "cu130".
ARG TORCH=cpu
# Optional extras of Rankwise, comma-separated, e.g. "s3".
ARG EXTRAS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /srv/rankwise

RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY pyproject.toml requirements.lock ./
# torch first and alone, so that no other package can come from its index.
RUN pip install --no-deps --index-url "https://download.pytorch.org/whl/${TORCH}" "$(grep -E '^torch==' requirements.lock)"
# The dependencies before the source: a change of code does not install them again.
COPY scripts/list_dependencies.py /tmp/list_dependencies.py
RUN python /tmp/list_dependencies.py pyproject.toml "${EXTRAS}" > /tmp/requirements.txt \
    && pip install -c requirements.lock -r /tmp/requirements.txt
COPY . .
# Not beside the source, where the image's user may not write: then nothing that is there would be used.
ENV NUMBA_CACHE_DIR=/opt/numba
# Editable: the rooms run from /srv/rankwise, beside their migrations, and `rankwise` is on the PATH.
RUN pip install --no-deps -e . \
    && python -m compileall -q app artifacts compose merge storage train transfer workers \
    && python -m merge.compiling \
    && rankwise --help > /dev/null

FROM ${PYTHON_IMAGE} AS runtime
LABEL org.opencontainers.image.title="Rankwise" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 rankwise \
    && useradd --uid 10001 --gid rankwise --home-dir /var/lib/rankwise --create-home --shell /usr/sbin/nologin rankwise
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /srv/rankwise /srv/rankwise
# Its own, for what another processor needs compiled anew.
COPY --from=builder --chown=10001:10001 /opt/numba /opt/numba
# Keys are on because the container listens on every address; Rankwise refuses to start otherwise. It is a switch, no secret.
# hadolint ignore=DL3064
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NUMBA_CACHE_DIR=/opt/numba \
    RANKWISE_HOST=0.0.0.0 \
    RANKWISE_PORT=8000 \
    RANKWISE_API_KEYS=on \
    RANKWISE_DATA_DIR=/var/lib/rankwise
USER 10001:10001
WORKDIR /srv/rankwise
VOLUME ["/var/lib/rankwise"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=4 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['RANKWISE_PORT'] + '/healthz', timeout=4)"]
ENTRYPOINT ["rankwise"]
CMD ["serve"]
