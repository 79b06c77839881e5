#!/usr/bin/env bash
# Makes .venv-te, the environment of `make test-te`: Megatron with Transformer Engine, to be looked at without a GPU.
# Does nothing where it is already up to date, and continues where it stopped. Needs .venv (tools/setup.sh), g++, about 6 GB
# of disk and 3 GB of memory.
set -euo pipefail
cd "$(dirname "$0")/.."

doing="comparing what is installed with what is wanted"
running=()

stop() {
    echo "setup-te: $1" >&2
    doing=
    exit 1
}

ended() {
    local status=$?
    if [ ${#running[@]} != 0 ]; then
        kill "${running[@]}" 2>/dev/null || true
    fi
    if [ "$status" != 0 ] && [ -n "$doing" ]; then
        echo "setup-te: stopped while $doing (exit status $status; above 128 it is a signal's number and 128, and 137 is often a lack of memory). What was done is kept: the same command continues from there." >&2
    fi
}
trap ended EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# A command in the background and waited for, so that a signal is reported at once.
waited() {
    local status=0
    "$@" &
    running=($!)
    wait "${running[0]}" || status=$?
    running=()
    return "$status"
}

wanted=$(cat requirements/te.txt requirements/te-extension.txt setup.py exprl_megatron/__init__.py tools/setup_te.sh | sha256sum)
if [ "$(cat .venv-te/.installed 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
command -v g++ >/dev/null || stop "no C++ compiler was found; install one with 'apt-get install g++'."

uv=build/uv/bin/uv
python=.venv-te/bin/python
doing="installing the locked environment into .venv-te"
echo "setup-te: $doing (about 6 GB)"
"$uv" venv --quiet --allow-existing --python .venv/bin/python .venv-te
waited "$uv" pip sync --quiet --python "$python" requirements/te.txt
"$uv" pip install --quiet --python "$python" --no-deps --no-build-isolation --editable .

site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
extension=$site/transformer_engine_torch$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
build=build/te
built=$(cat requirements/te.txt requirements/te-extension.txt tools/setup_te.sh "$headers/patchlevel.h" | sha256sum)
if [ "$(cat "$build/unpacked" 2>/dev/null)" != "$built" ]; then
    doing="fetching the source of Transformer Engine's torch extension"
    rm -rf "$build"
    mkdir -p "$build/source"
    # pip asks an archive for its metadata even when it only fetches it: the build must be possible, not done.
    NVTE_PYTORCH_FORCE_BUILD=TRUE CUDA_HOME=$site/nvidia/cu13 waited build/uv/bin/pip --python "$python" download --quiet \
        --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: --require-hashes \
        --dest "$build" --requirement requirements/te-extension.txt
    tar --extract --gzip --strip-components=1 --directory "$build/source" --file "$build"/transformer_engine_torch-*.tar.gz
    echo "$built" >"$build/unpacked"
fi
if [ ! -e "$build/extension.so" ]; then
    # Its 33 files are compiled as two, unoptimised: a minute instead of half an hour. Nothing of it will run
    # on a GPU, where the package's own build is right.
    csrc=$PWD/$build/source/csrc
    first='/(activation|cast|common|ep|gemm|normalization|quantizer|swizzle|type_converters)\.cpp$'
    find "$csrc" -name '*.cpp' | sort | grep -E "$first" | sed 's/.*/#include "&"/' >"$build/first.cpp"
    find "$csrc" -name '*.cpp' | sort | grep -vE "$first" | sed 's/.*/#include "&"/' >"$build/second.cpp"
    shared=$build/source/common_headers
    flags=(
        -std=c++20 -O0 -g0 -fPIC -fvisibility=hidden -w
        -DTORCH_API_INCLUDE_EXTENSION_H -DTORCH_EXTENSION_NAME=transformer_engine_torch -DNVTE_WITH_NCCL_EP -DUSE_NCCL
        -I"$site/nvidia/cu13/include" -I"$site/nvidia/cudnn/include" -I"$site/nvidia/nccl/include"
        -I"$shared" -I"$shared/common" -I"$shared/common/include" -I"$csrc"
        -I"$site/torch/include" -I"$site/torch/include/torch/csrc/api/include" -I"$headers"
    )
    doing="compiling Transformer Engine's torch extension"
    parts=()
    for part in first second; do
        # An object of this name is whole: the compiler writes beside it.
        if [ ! -e "$build/$part.o" ]; then
            echo "setup-te: compiling the $part half of Transformer Engine's torch extension (some minutes)"
            g++ "${flags[@]}" -c "$build/$part.cpp" -o "$build/$part.tmp" &
            running+=($!)
            parts+=("$part")
        fi
    done
    failed=0
    for at in "${!parts[@]}"; do
        if wait "${running[at]}"; then
            mv "$build/${parts[at]}.tmp" "$build/${parts[at]}.o"
        else
            failed=$?
        fi
    done
    running=()
    [ "$failed" = 0 ] || exit "$failed"
    doing="linking Transformer Engine's torch extension"
    libraries=(-lc10 -ltorch -ltorch_cpu -ltorch_python -lc10_cuda -ltorch_cuda -l:libcudart.so.13)
    waited g++ -shared -s "$build/first.o" "$build/second.o" -L"$site/torch/lib" -L"$site/nvidia/cu13/lib" \
        "${libraries[@]}" -o "$build/extension.tmp"
    mv "$build/extension.tmp" "$build/extension.so"
fi
cp "$build/extension.so" "$extension"
doing="importing Transformer Engine"
waited "$python" -c 'import torch, transformer_engine.pytorch' || stop "Transformer Engine cannot be imported; remove .venv-te and build/te and try again."
echo "$wanted" >.venv-te/.installed
