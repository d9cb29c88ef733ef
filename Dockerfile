# An image of the server with the demo model and its table in it.
#
#   docker build -t tolserve --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#   docker run --rm -p 127.0.0.1:8000:8000 --read-only --tmpfs /tmp --cap-drop ALL tolserve
#   docker run ... -v /srv/models:/models:ro tolserve serve /models/mine --device-cache 10%
#   docker run ... --gpus 1 --tmpfs /triton:exec,mode=1777 -e TRITON_CACHE_DIR=/triton tolserve
#
# The last one because Triton loads what it compiled as a library, and Docker's /tmp allows no code to run from it.
#
# Build arguments:
#   BASE_IMAGE     any image of Debian or Ubuntu. One without Python 3.11 or later names it in APT_PACKAGES.
#   TORCH_INDEX    where PyTorch's wheels for a platform lie, beside the index that pip knows: .../whl/cpu or
#                  .../whl/cu130. PyTorch's CUDA wheels bring CUDA's libraries along, so a plain Python base is enough;
#                  the host has the driver. Empty: what pip finds by itself.
#   APT_PACKAGES   what the base lacks. CUDA needs a C compiler, because Triton compiles a launcher at its first kernel:
#                  "gcc libc6-dev" on python:3.11-slim, "python3-pip python3-dev gcc" on nvidia/cuda:*-ubuntu24.04.
#   BUILD_PACKAGES a C compiler for the CPU kernels, which only the building stage gets, unless the base has one. If it
#                  cannot be installed the image is built without these kernels: it works, and is slower on a CPU.
#
# What the running container writes goes below /tmp, which is its home. A table that a model lacks is built at the
# start, below /tmp/.cache: mount a volume and name it with TOLSERVE_CACHE_DIR to keep it (/cache is there for that,
# and belongs to the server's user), or build it beforehand with `tolserve table build`.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS base
ARG APT_PACKAGES=""
RUN if [ -n "$APT_PACKAGES" ]; then \
        apt-get update -qq \
        && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $APT_PACKAGES \
        && rm -rf /var/lib/apt/lists/*; \
    fi
# Debian's and Ubuntu's own Python refuses pip without the second; in an image nobody else uses that Python.
ENV PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1

# Files that the final stage copies are compared by content, so its large layer of dependencies stays while their list
# does, and a change of the source replaces the last layers alone.
FROM base AS parts
WORKDIR /src
ARG BUILD_PACKAGES="gcc libc6-dev"
RUN command -v cc \
    || { apt-get update -qq \
         && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $BUILD_PACKAGES; }; \
    command -v cc \
    || echo "no C compiler: the image will lack the CPU kernels" >&2
COPY pyproject.toml constraints.txt ./
RUN python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['fast'], sep='\n')" \
    > requirements.txt
COPY . ./
RUN python3 -m pip install -q --no-deps --target /app .

FROM base
ARG TORCH_INDEX=""
COPY --from=parts /src/requirements.txt /src/constraints.txt /app/
# PyTorch's own tests and headers are a seventh of the image, and nothing that runs here reads them.
RUN python3 -m pip install -q ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        -c /app/constraints.txt -r /app/requirements.txt \
    && cd "$(python3 -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')" \
    && rm -rf test include bin/test_*

# PyTorch asks for the user's name, so there must be one.
RUN echo 'tolserve:x:10001:10001::/tmp:/usr/sbin/nologin' >> /etc/passwd \
    && mkdir /models /cache && chown 10001:10001 /cache

COPY --from=parts /app /app
ENV PATH=/app/bin:$PATH PYTHONPATH=/app
# Beside the demo model, so that a container with a read-only root starts at once.
RUN tolserve table build /app/tolserve/demo_model

USER 10001:10001
WORKDIR /tmp
ENV HOME=/tmp PYTHONDONTWRITEBYTECODE=1 TOLSERVE_HOST=0.0.0.0 TOLSERVE_PORT=8000
EXPOSE 8000

# It asks the port that TOLSERVE_PORT names: change the port in a container by that variable and not by --port.
# http.client, because urllib would go through a proxy named in the environment.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python3", "-IS", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['TOLSERVE_PORT']), timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]

# The server itself is process 1 and gets SIGTERM.
ENTRYPOINT ["tolserve"]
CMD ["serve"]

ARG REVISION=""
LABEL org.opencontainers.image.title="tolserve" \
      org.opencontainers.image.description="An inference server for MemoryLLM models" \
      org.opencontainers.image.revision="${REVISION}"
