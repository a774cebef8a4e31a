# Images of longctx, installed from the lock files as `make install` does. Both stages: docker build --target cpu|cuda .
#
# cuda: torch's CUDA build, which brings its CUDA and NCCL; the host needs NVIDIA's driver and container toolkit.
# cpu: give PyTorch's CPU index as --build-arg PIP_EXTRA_INDEX_URL=…; without it torch's CUDA build is installed.

FROM python:3.11-slim-bookworm AS source
# g++ builds the CPU kernels; Triton compiles its launchers with gcc.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/longctx
COPY . .
# Compiled kernels, beside the code: the user of a container may have no home.
ENV XDG_CACHE_HOME=/opt/longctx/.cache
ENV PATH=/opt/longctx/.venv/bin:$PATH
CMD ["longctx", "--help"]

FROM source AS cpu
ARG PIP_EXTRA_INDEX_URL
RUN make install PYTHON=python3.11 && rm -rf /root/.cache && chmod -R a+rX /opt/longctx

FROM source AS cuda
RUN make install PYTHON=python3.11 && rm -rf /root/.cache && chmod -R a+rX /opt/longctx
