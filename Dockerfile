# Runs bundles on the CPU, and makes them where EXTRAS says so; docs/containers.md is its page.
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .
# Extras of pyproject.toml: `cpu` runs bundles, `build,cpu` makes them too.
ARG EXTRAS=cpu
# Another index for pip to look in, as that of PyTorch's wheels without CUDA.
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/d3tom-export \
    && /opt/d3tom-export/bin/pip install --no-cache-dir --constraint constraints.txt "$(echo /wheels/*.whl)[${EXTRAS}]"

FROM python:${PYTHON_VERSION}-slim-bookworm
COPY --from=build /opt/d3tom-export /opt/d3tom-export
RUN useradd --create-home --uid 10001 d3tom \
    && install --directory --owner d3tom /work
ENV PATH=/opt/d3tom-export/bin:$PATH \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /work
ENTRYPOINT ["d3tom-export"]
CMD ["--help"]
