"""Folders that become visible when they are complete."""

import os
import stat

import numpy as np
import pytest
from safetensors.numpy import save_file

from softshard.storage.folders import new_folder


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "a/b", keep_existing=False) as made:
        (made / "file").write_text("content")
        assert not (tmp_path / "a/b").exists()
    assert (tmp_path / "a/b/file").read_text() == "content"
    assert os.listdir(tmp_path / "a") == ["b"]


def test_nothing_is_left_of_a_folder_that_failed(tmp_path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "b", keep_existing=True) as made:
        (made / "no folder" / "file").write_text("content")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("keep_existing", [True, False])
def test_a_folder_of_another_process_is_kept(tmp_path, keep_existing):
    def write(text):
        with new_folder(tmp_path / "b", keep_existing=keep_existing) as made:
            (made / "file").write_text(text)

    write("first")
    if keep_existing:
        write("second")
    else:
        with pytest.raises(OSError, match="not empty"):
            write("second")
    assert (tmp_path / "b/file").read_text() == "first"


@pytest.mark.parametrize(
    ("mask", "files", "folders"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o077, 0o600, 0o700)]
)
def test_every_file_and_folder_has_the_mode_of_the_umask(tmp_path, mask, files, folders):
    """safetensors writes files that only their owner can read."""
    before = os.umask(mask)
    try:
        with new_folder(tmp_path / "made", keep_existing=False) as made:
            (made / "below").mkdir()
            save_file({"x": np.zeros(3)}, made / "below/model.safetensors")
            (made / "README.md").write_text("text")
    finally:
        os.umask(before)
    found = [tmp_path / "made", *(tmp_path / "made").rglob("*")]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in found}
    assert modes == {"made": folders, "below": folders, "model.safetensors": files, "README.md": files}
