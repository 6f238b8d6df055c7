"""Folders that become visible when they are complete."""

import os

import pytest

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
