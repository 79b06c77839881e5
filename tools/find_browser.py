"""Prints the path of the Chromium that the tests of `exprl report` use; exit status 1 where there is none."""

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Playwright, sync_playwright

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SHELLS = ("chrome-headless-shell", "headless_shell")


def find_browser(playwright: Playwright) -> str | None:
    """That of the system, or the one that Playwright has installed; None where there is neither."""
    for name in _NAMES:
        if path := shutil.which(name):
            return path
    whole = Path(playwright.chromium.executable_path)
    # Playwright's folder of browsers: each is in a folder of its own there.
    shells = (found for name in _SHELLS for found in whole.parents[2].glob(f"*/*/{name}"))
    return str(next((path for path in (whole, *shells) if path.is_file()), "")) or None


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    with sync_playwright() as playwright:
        found = find_browser(playwright)
    if found is None:
        sys.exit(1)
    print(found)
