FROM python:3.11-slim

# An index to take torch from, such as that of the builds for CPUs, which are a fraction of the size. Empty: the
# default index, whose builds for Linux on x86-64 are for CUDA.
ARG TORCH_INDEX_URL=""

ENV NUMBER_OF_WORKERS=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1

# Also where LOG_PATH (logs/log.txt) starts from, and where a mounted .env is read.
WORKDIR /app

COPY feature_extraction_server-core /tmp/feature_extraction_server-core
RUN python -m pip install --no-cache-dir /tmp/feature_extraction_server-core "gunicorn>=23" \
    && rm -rf /tmp/feature_extraction_server-core

COPY docker/install_plugins.sh /tmp/
COPY plugins_to_install /tmp/plugins_to_install
RUN /tmp/install_plugins.sh /tmp/plugins_to_install \
    && rm -rf /tmp/install_plugins.sh /tmp/plugins_to_install /var/lib/apt/lists/*

COPY gunicorn.conf.py docker/healthcheck.py /app/

# Checkpoints are downloaded to here.
VOLUME /root/.cache
EXPOSE 5000
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["python", "/app/healthcheck.py"]

# Without a shell in between, gunicorn itself gets the SIGTERM of `docker stop`.
CMD ["gunicorn", "-c", "/app/gunicorn.conf.py"]
