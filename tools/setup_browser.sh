#!/usr/bin/env bash
# A headless Chromium for the tests of `exprl report`; does nothing where one is there.
# As root on Debian or Ubuntu it comes from their packages, elsewhere from Playwright. What fails here is reported and left to the tests.
set -euo pipefail
cd "$(dirname "$0")/.."

found() {
    .venv/bin/python tools/find_browser.py >/dev/null 2>&1
}

found && exit 0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "setup: installing a headless Chromium for the tests"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    {
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium-headless-shell fonts-dejavu-core ||
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core
    } >"$log" 2>&1 || true
    found && exit 0
fi
.venv/bin/playwright install chromium --only-shell >>"$log" 2>&1 || true
found && exit 0
echo "setup: no Chromium was installed ($(tail -n 1 "$log")); install one, for example with 'apt-get install chromium', for the tests of exprl report." >&2
