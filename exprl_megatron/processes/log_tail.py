"""The last lines of a server's log, for error messages."""

from pathlib import Path

_BYTES = 16_384


def log_tail(log_file: Path | None, lines: int = 15) -> str:
    """` Log: PATH; its last lines:` and those lines, or as much of it as there is."""
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
    return f" Log: {log_file}; its last lines:\n" + "\n".join(f"    {line}" for line in last)
