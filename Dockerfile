# Lilliput with its locked packages. Runs every command of the project (docs/operations.md#in-a-container):
#   docker build --tag lilliput .
#   docker run --rm lilliput lilliput --help
# Nothing listens beyond loopback without LILLIPUT_TOKEN; the image contains no token and no model.
FROM python:3.11.14-slim-bookworm

# git: models' commits and DVC; g++: the packages that are built from source; libgomp1: llama.cpp and torch.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git libgomp1 && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 lilliput && mkdir -p /lilliput /cache && chown 1000:1000 /lilliput /cache
USER 1000:1000
WORKDIR /lilliput
ENV HOME=/home/lilliput PATH="/home/lilliput/venv/bin:$PATH" LILLIPUT_CACHE=/cache PYTHONUNBUFFERED=1

# The build of torch for processors. PyPI's has CUDA, some gigabytes: --build-arg PIP_EXTRA_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

# As in the Makefile: torch first, because gptqmodel is built from source and needs it.
COPY --chown=1000:1000 requirements.lock ./
# hadolint ignore=DL3042,DL4006,SC2046
RUN --mount=type=cache,target=/home/lilliput/.cache/pip,uid=1000 \
    python -m venv /home/lilliput/venv \
    && pip install $(grep -E '^(torch|setuptools|wheel)==' requirements.lock) \
    && pip install --no-build-isolation --requirement requirements.lock

COPY --chown=1000:1000 . .
# The image has no .git (.dockerignore), so DVC must not look for one.
RUN pip install --no-cache-dir --no-build-isolation --no-deps --editable . \
    && python -m dvc config --local core.no_scm true

VOLUME ["/cache"]
CMD ["lilliput", "--help"]
