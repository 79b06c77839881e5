"""The end of a process's log, for error messages."""

import re
from pathlib import Path

_BYTES = 2**20
_FATAL = re.compile(
    r" hit an exception: Traceback.*?^((?:\w+\.)*[A-Z]\w*(?:Error|Exception)\b[^\n]*)", re.MULTILINE | re.DOTALL
)
"""How SGLang logs what ends one of its processes, and the last line of the first traceback there."""
_SHOWN = 300


def log_tail(log_file: Path | None, lines: int = 15) -> str:
    """Return ` Log: PATH; its last lines:` and those lines, or as much of it as there is.

    Names the exception that ended a server's process too, where those lines do not have it: the other ranks log the
    death of the first one after its own error. Reads the last MiB.
    """
    if log_file is None:
        return " Its log is not on this machine."
    try:
        with open(log_file, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _BYTES))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f" Log: {log_file} (unreadable: {error.strerror})."
    last = [line for line in text.splitlines() if line.strip()][-lines:]
    fatal = _FATAL.search(text)
    cause = "" if fatal is None or fatal[1] in last else f"first error: {fatal[1][:_SHOWN]}; "
    return f" Log: {log_file}; {cause}its last lines:\n" + "\n".join(f"    {line}" for line in last)
