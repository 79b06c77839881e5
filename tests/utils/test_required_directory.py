"""Where a run can be written: said before anything is started, for any place that takes no directory."""

import errno
import os
from pathlib import Path

import pytest

from exprl_megatron.errors import UserError, exit_status, storage_sentence
from exprl_megatron.utils.files import require_directory


def test_a_directory_that_is_there_or_can_be_made_is_one(tmp_path):
    require_directory(tmp_path)
    require_directory(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_a_file_on_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"Cannot use {path}: {tmp_path}/file is a file; choose a path"):
            require_directory(path)


def test_a_directory_that_the_user_may_not_write_to_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"Cannot use {tmp_path}/run: this user may not write to {tmp_path}; choose"):
        require_directory(tmp_path / "run")


@pytest.mark.parametrize("place", ["/proc/run", "/sys/run/a"])
def test_the_kernels_directories_take_none(place, tmp_path):
    with pytest.raises(UserError, match=f"Cannot use {place}, which the kernel keeps; choose a directory on a disk"):
        require_directory(Path(place))
    (tmp_path / "link").symlink_to("/proc")
    with pytest.raises(UserError, match="which the kernel keeps"):
        require_directory(tmp_path / "link" / "run")


def test_what_cannot_be_made_in_them_is_one_sentence_and_what_is_missing_elsewhere_is_not(tmp_path):
    with pytest.raises(FileNotFoundError) as made:
        Path("/proc/exprl.html.tmp").write_bytes(b"")
    said = storage_sentence(made.value)
    assert said.startswith("Cannot use /proc/exprl.html.tmp, which the kernel keeps; choose a place on a disk")
    assert exit_status(made.value) == 2
    assert storage_sentence(FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "x"))) is None
