# The server with the plugins of plugins_to_install.
#
#     docker build -t example_image_name .                             models run on the CPU
#     docker build --build-arg DEVICE=cuda -t example_image_name .     models run on an NVIDIA GPU
#
# What is installed is made in a stage of its own, whose compilers and caches the image does not have. Both stages are
# of the same Debian and Python, so that the virtual environment works in the other one. Builds of torch for CUDA bring
# CUDA's libraries, which leaves the driver, and that is the host's: both variants have the same base.

FROM python:3.11 AS build

# cpu or cuda
ARG DEVICE=cpu
# Another package index to take torch from, for cpu that of the builds for CPUs. Empty: the default one.
ARG TORCH_INDEX_URL=""

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/venv/bin:$PATH

WORKDIR /build
RUN python -m venv /opt/venv

COPY feature_extraction_server-core feature_extraction_server-core
RUN --mount=type=cache,target=/root/.cache/pip python -m pip install ./feature_extraction_server-core "gunicorn~=27.0"

COPY docker docker
COPY plugins_to_install plugins_to_install
RUN --mount=type=cache,target=/root/.cache/pip docker/install_plugins.sh plugins_to_install \
    && python -m pip uninstall --yes pip


FROM python:3.11-slim

LABEL org.opencontainers.image.title="Feature Extraction Server" \
      org.opencontainers.image.description="One HTTP server in front of many AI models" \
      org.opencontainers.image.version="1.0.0" \
      org.opencontainers.image.licenses="MIT"

# Also where LOG_PATH (logs/log.txt) starts from, and where a mounted .env is read.
WORKDIR /app

RUN --mount=type=bind,source=docker,target=/build/docker \
    --mount=type=bind,source=plugins_to_install,target=/build/plugins_to_install,rw \
    /build/docker/install_system_dependencies.sh /build/plugins_to_install \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

# What the server writes to lies in these three folders and in /tmp: the rest may be mounted read-only. Like /tmp they
# are open to any user, so that `docker run --user` works. Checkpoints are where they are for root, whose home is the
# server's as well: `-v ~/.cache:/root/.cache` takes them from the host.
RUN groupadd --gid 1000 server \
    && useradd --uid 1000 --gid 1000 --home-dir /root --no-create-home --shell /usr/sbin/nologin server \
    && mkdir -p /root/.cache /app/logs /data \
    && chmod 755 /root \
    && chmod 1777 /root/.cache /app/logs /data

COPY --from=build /opt/venv /opt/venv
COPY --chmod=644 gunicorn.conf.py docker/healthcheck.py /app/

ENV PATH=/opt/venv/bin:$PATH \
    HOME=/root \
    XDG_CACHE_HOME=/root/.cache \
    HF_HOME=/root/.cache/huggingface \
    NUMBER_OF_WORKERS=1 \
    PYTHONUNBUFFERED=1

# By number, which is what Kubernetes can tell from root.
USER 1000:1000

# Models whose checkpoints the image is to have, separated by spaces, or --all. Before VOLUME, which keeps what is there.
# The token for those that are gated does not stay in the image: docker build --secret id=HF_TOKEN,env=HF_TOKEN ...
ARG PULL_MODELS=""
# Whichever user a container is given may add to what is there.
# hadolint ignore=SC2086
RUN --mount=type=secret,id=HF_TOKEN,uid=1000 \
    [ -z "$PULL_MODELS" ] || { \
        if [ -f /run/secrets/HF_TOKEN ]; then HF_TOKEN=$(cat /run/secrets/HF_TOKEN); export HF_TOKEN; fi \
        && python -m feature_extraction_server.core.pull $PULL_MODELS \
        && find /root/.cache -mindepth 1 -exec chmod a+rwX {} +; }

VOLUME /root/.cache
EXPOSE 5000
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["python", "/app/healthcheck.py"]

# Without a shell in between, gunicorn itself gets the SIGTERM of `docker stop`.
STOPSIGNAL SIGTERM
CMD ["gunicorn", "-c", "/app/gunicorn.conf.py"]
