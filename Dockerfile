# syntax=docker/dockerfile:1
# Two images from the pins of setup.py and requirements/; neither runs as root.
#   docker build -t exprl .                           for nodes with H100s: CUDA 13, Transformer Engine compiled
#   docker build -t exprl --build-arg APEX=25.09 .    the same with NVIDIA apex at that tag: policies in bf16 then add
#                                                     weight gradients within the matrix products, unless their
#                                                     gradient_accumulation_fusion is false
#   docker build -t exprl-cpu --target cpu .          without CUDA; `docker run --rm exprl-cpu` runs `make test`
# The tests on a Slurm of their own need root and mounts:
#   docker run --rm --user root --privileged exprl-cpu make test-slurm

# ---- without CUDA -----------------------------------------------------------------------------------------------
FROM ubuntu:24.04 AS cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ make python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /bin/bash exprl \
    && install -d -o exprl -g exprl /home/exprl/exprl_megatron
ENV UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 HF_HUB_OFFLINE=1
USER 10001
WORKDIR /home/exprl/exprl_megatron
# The locked environment first: a change of the project does not install it again.
COPY --chown=exprl:exprl Makefile setup.py pyproject.toml ./
COPY --chown=exprl:exprl requirements requirements
COPY --chown=exprl:exprl tools/setup.sh tools/setup.sh
COPY --chown=exprl:exprl exprl_megatron/__init__.py exprl_megatron/__init__.py
RUN make setup
COPY --chown=exprl:exprl . .
ENV PATH=/home/exprl/exprl_megatron/.venv/bin:$PATH
HEALTHCHECK --interval=10m --timeout=2m --start-period=1m CMD ["exprl", "doctor"]
CMD ["make", "test"]

# ---- for H100s: one torch and one NCCL for trainer and servers --------------------------------------------------
# The compiler of CUDA 13 stays in the image: SGLang compiles kernels when it needs them.
# libibverbs and its drivers are what NCCL loads to reach InfiniBand and RoCE; without them it takes TCP silently.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS environment
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ ibverbs-providers libibverbs1 libnuma1 \
        librdmacm1 make python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
ENV UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 CUDA_HOME=/usr/local/cuda TORCH_CUDA_ARCH_LIST=9.0 \
    VIRTUAL_ENV=/opt/exprl PATH=/opt/exprl/bin:/opt/uv/bin:$PATH
COPY requirements/gpu.txt requirements/te-extension.txt /opt/requirements/
RUN python3.12 -m venv /opt/uv && /opt/uv/bin/pip install uv==0.13.9
RUN uv venv --python python3.12 /opt/exprl && uv pip sync --compile-bytecode /opt/requirements/gpu.txt

# What is compiled is compiled in a stage of its own; it takes about half an hour of one core, and more for apex.
FROM environment AS kernels
ARG APEX=""
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
# cuDNN's and NCCL's headers are those of the packages that torch installs.
RUN packages=$(python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/nvidia \
    && export CPATH="$packages/cudnn/include:$packages/nccl/include" \
    && export LIBRARY_PATH="$packages/cudnn/lib:$packages/nccl/lib" \
    && export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS=8 \
    && /opt/uv/bin/pip --python /opt/exprl/bin/python wheel --no-build-isolation --no-deps --require-hashes \
        --wheel-dir /wheels --requirement /opt/requirements/te-extension.txt
RUN if [ -n "$APEX" ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 MAX_JOBS=8 /opt/uv/bin/pip --python /opt/exprl/bin/python wheel \
            --no-build-isolation --no-deps --wheel-dir /wheels "git+https://github.com/NVIDIA/apex@$APEX"; \
    fi

FROM environment AS gpu
RUN --mount=type=bind,from=kernels,source=/wheels,target=/wheels uv pip install --no-deps /wheels/*.whl \
    && python -c 'import torch, transformer_engine.pytorch; \
lines = [line.split() for line in open("/proc/self/maps")]; \
nccl = {line[-1] for line in lines if "libnccl.so" in line[-1]}; \
assert len(nccl) == 1 and "/opt/exprl/" in min(nccl), f"one NCCL is wanted, the one of torch: {nccl}"' \
    && if python -c 'import apex' 2>/dev/null; then python -c 'import torch, fused_weight_gradient_mlp_cuda'; fi \
    && useradd --uid 10001 --create-home --shell /bin/bash exprl \
    && install -d -o exprl -g exprl /opt/exprl_megatron
WORKDIR /opt/exprl_megatron
COPY --chown=exprl:exprl . .
RUN uv pip install --no-deps --no-build-isolation --editable .
USER 10001
HEALTHCHECK --interval=10m --timeout=2m --start-period=1m CMD ["exprl", "doctor", "--gpus"]
CMD ["exprl", "doctor", "--gpus"]
