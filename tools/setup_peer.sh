#!/usr/bin/env bash
# Makes .venv-peer, the environment of `make bench-peer`: TRL with the torch and transformers of .venv.
# Does nothing where it is already up to date. Needs .venv (tools/setup.sh) and about 6 GB.
set -euo pipefail
cd "$(dirname "$0")/.."

wanted=$(cat requirements/peer.txt tools/setup_peer.sh | sha256sum)
if [ "$(cat .venv-peer/.installed 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
uv=build/uv/bin/uv
if [ ! -x "$uv" ] || [ ! -x .venv/bin/python ]; then
    echo "setup-peer: .venv is missing; run 'make setup' first." >&2
    exit 1
fi
echo "setup-peer: installing the locked environment into .venv-peer (about 6 GB)"
"$uv" venv --quiet --allow-existing --python .venv/bin/python .venv-peer
"$uv" pip sync --quiet --compile-bytecode --python .venv-peer/bin/python requirements/peer.txt
echo "$wanted" >.venv-peer/.installed
