"""Checks whether a server answers, for callers outside of an event loop."""

import urllib.error
import urllib.request

_ANSWER_S = 5.0


def healthy(url: str) -> bool:
    """Return whether the server at `url` answers /health."""
    # No proxy is between the machines of a run, whatever the environment says.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/health", timeout=_ANSWER_S) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False
