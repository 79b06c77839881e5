#!/usr/bin/env bash
# Makes .venv-te, the environment of `make test-te`: Megatron with Transformer Engine, to be looked at without a GPU.
# Does nothing where it is already up to date. Needs .venv (tools/setup.sh), g++ and about 6 GB.
set -euo pipefail
cd "$(dirname "$0")/.."

stop() {
    echo "setup-te: $1" >&2
    exit 1
}

wanted=$(cat requirements/te.txt requirements/te-extension.txt setup.py exprl_megatron/__init__.py tools/setup_te.sh | sha256sum)
if [ "$(cat .venv-te/.installed 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
command -v g++ >/dev/null || stop "no C++ compiler was found; install one with 'apt-get install g++'."

uv=build/uv/bin/uv
python=.venv-te/bin/python
echo "setup-te: installing the locked environment into .venv-te (about 6 GB)"
"$uv" venv --quiet --allow-existing --python .venv/bin/python .venv-te
"$uv" pip sync --quiet --python "$python" requirements/te.txt
"$uv" pip install --quiet --python "$python" --no-deps --no-build-isolation --editable .

site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
extension=$site/transformer_engine_torch$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
build=build/te
built=$(cat requirements/te.txt requirements/te-extension.txt tools/setup_te.sh "$headers/patchlevel.h" | sha256sum)
if [ "$(cat "$build/built" 2>/dev/null)" != "$built" ]; then
    rm -rf "$build"
    mkdir -p "$build/source"
    # pip asks an archive for its metadata even when it only fetches it: the build must be possible, not done.
    NVTE_PYTORCH_FORCE_BUILD=TRUE CUDA_HOME=$site/nvidia/cu13 build/uv/bin/pip --python "$python" download --quiet \
        --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: --require-hashes \
        --dest "$build" --requirement requirements/te-extension.txt
    tar --extract --gzip --strip-components=1 --directory "$build/source" --file "$build"/transformer_engine_torch-*.tar.gz

    # Its 33 files are compiled as two, unoptimised: a minute instead of half an hour. Nothing of it will run
    # on a GPU, where the package's own build is right.
    echo "setup-te: compiling Transformer Engine's torch extension (some minutes)"
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
    g++ "${flags[@]}" -c "$build/first.cpp" -o "$build/first.o" &
    one=$!
    g++ "${flags[@]}" -c "$build/second.cpp" -o "$build/second.o" || stop "the compiler failed; its message is above."
    wait "$one" || stop "the compiler failed; its message is above."
    libraries=(-lc10 -ltorch -ltorch_cpu -ltorch_python -lc10_cuda -ltorch_cuda -l:libcudart.so.13)
    g++ -shared -s "$build/first.o" "$build/second.o" -L"$site/torch/lib" -L"$site/nvidia/cu13/lib" \
        "${libraries[@]}" -o "$build/extension.so"
    echo "$built" >"$build/built"
fi
cp "$build/extension.so" "$extension"
"$python" -c 'import torch, transformer_engine.pytorch' || stop "Transformer Engine cannot be imported; remove .venv-te and build/te and try again."
echo "$wanted" >.venv-te/.installed
