"""Fills every directory where anyone may write."""

import json
import os
import tempfile

told = json.loads(input())
for directory in (told["directory"], "/tmp", "/var/tmp", "/dev/shm", "/run", ".", "/"):
    for number in range(10):
        try:
            with open(os.path.join(directory, f"{told['name']}-{number}"), "wb") as file:
                file.write(bytes(2**20))
        except OSError:
            continue
for make in (tempfile.mkdtemp, tempfile.mkstemp, tempfile.NamedTemporaryFile):
    try:
        make(prefix=told["name"], dir=told["directory"])
    except OSError:
        continue
