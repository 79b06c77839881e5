#!/usr/bin/env bash
# Makes .venv from requirements/cpu.txt with uv; does nothing where it is already up to date.
set -euo pipefail
cd "$(dirname "$0")/.."

stop() {
    echo "setup: $1" >&2
    exit 1
}

wanted=$(cat requirements/cpu.txt setup.py exprl_megatron/__init__.py | sha256sum)
if [ -x .venv/bin/exprl ] && [ "$(cat .venv/.installed 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

# A name on the PATH may be a version manager's shim that refuses to run: every candidate is tried.
candidates=(
    "${PYTHON:-}" python3.12 python3 python
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python
    "${ASDF_DATA_DIR:-$HOME/.asdf}"/installs/python/3.12*/bin/python
    "$HOME"/.local/share/mise/installs/python/3.12*/bin/python
    "$HOME"/.local/share/uv/python/cpython-3.12*/bin/python
    "$HOME"/{miniconda3,miniforge3,anaconda3}/envs/*/bin/python3.12
    /usr/local/bin/python3.12 /opt/python*/bin/python3.12
)
python=
for candidate in "${candidates[@]}"; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || stop "Python 3.12 was not found; install it (for example with 'pyenv install 3.12' or 'apt-get install python3.12 python3.12-venv') or set PYTHON to its path."
"$python" -c 'import ensurepip' 2>/dev/null || stop "$python has no ensurepip; install it with 'apt-get install python3.12-venv'."
command -v cc >/dev/null || command -v gcc >/dev/null || stop "no C compiler was found; install one with 'apt-get install build-essential'."

uv=build/uv/bin/uv
if [ ! -x "$uv" ]; then
    echo "setup: fetching uv"
    "$python" -m venv build/uv
    build/uv/bin/pip install --quiet --disable-pip-version-check 'uv==0.13.9'
fi
echo "setup: installing the locked environment into .venv (about 7 GB)"
"$uv" venv --quiet --allow-existing --python "$python" .venv
"$uv" pip sync --quiet --compile-bytecode --python .venv/bin/python requirements/cpu.txt
"$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
echo "$wanted" >.venv/.installed
