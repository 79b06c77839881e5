import os
import stat

import pytest

from exprl_megatron.utils.files import write_atomically


def test_the_name_of_a_file_is_on_disk_as_its_contents_are(tmp_path, monkeypatch):
    """In this order: contents, name, and that name's directory; a power cut in between leaves the old file."""
    events, fsync, replace = [], os.fsync, os.replace

    def synced(file):
        mode = os.fstat(file).st_mode
        events.append("directory" if stat.S_ISDIR(mode) else "contents")
        fsync(file)

    def replaced(*paths, **keywords):
        events.append("name")
        replace(*paths, **keywords)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_atomically(tmp_path / "new" / "file", b"1")
    assert events == ["contents", "name", "directory"]
    assert (tmp_path / "new" / "file").read_bytes() == b"1"


def test_an_error_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
