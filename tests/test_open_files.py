"""Tensors from files that stay open."""

import os

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ria_vllm.checkpoint.side_files import load_permutations
from ria_vllm.errors import RiaError
from ria_vllm.files import open_files
from ria_vllm.files.open_files import MOST_FILES, OpenFiles


@pytest.fixture
def opened(monkeypatch):
    """The files that were opened, one entry each time."""
    found = []
    monkeypatch.setattr(open_files, "safe_open", lambda path, framework: found.append(path) or safe_open(path, "pt"))
    return found


def test_a_file_is_opened_once_for_all_its_tensors(opened, tmp_path):
    path = tmp_path / "permutations.safetensors"
    permutations = {f"{number}": torch.randperm(8) for number in range(50)}
    save_file({f"{name}.input_permutation": p for name, p in permutations.items()}, path)
    found = load_permutations(path)
    assert all(torch.equal(found[name], p) for name, p in permutations.items())
    assert len(opened) == 1


def test_a_file_that_was_replaced_is_read_again(opened, tmp_path):
    path, files = tmp_path / "a.safetensors", OpenFiles()
    for value in (1.0, 2.0):
        save_file({"x": torch.full((4,), value)}, tmp_path / "new")
        os.replace(tmp_path / "new", path)
        assert files.tensor(path, "x").tolist() == [value] * 4
    path.unlink()
    with pytest.raises(RiaError, match="a.safetensors: cannot read x"):
        files.tensor(path, "x")


def test_what_was_read_stays_though_its_file_is_truncated(tmp_path):
    """Where memory was mapped from the file, the system would kill the process."""
    path, files = tmp_path / "a.safetensors", OpenFiles()
    save_file({"x": torch.ones(4, 1 << 12)}, path)
    found, part = files.tensor(path, "x"), files.read(path, "x", 3)
    os.truncate(path, 9)
    assert found.sum() == 4 * part.sum() == 1 << 14
    with pytest.raises(RiaError, match="a.safetensors: cannot read x"):
        files.tensor(path, "x")


def test_a_part_of_a_tensor(opened, tmp_path):
    path, files, stack = tmp_path / "a.safetensors", OpenFiles(), torch.randn(3, 2, 4)
    save_file({"x": stack}, path)
    assert all(torch.equal(files.read(path, "x", index), stack[index]) for index in range(3))
    assert files.shape(path, "x") == (3, 2, 4) and len(opened) == 1
    with pytest.raises(SafetensorError):
        files.read(path, "y", 0)


def test_few_files_stay_open_and_little_of_them_stays_mapped(opened, tmp_path):
    paths = [tmp_path / str(number) for number in range(MOST_FILES + 1)]
    for path in paths:
        save_file({"x": torch.zeros(4)}, path)
    files = OpenFiles()
    for path in [*paths, *paths[1:], paths[0]]:
        files.tensor(path, "x")
    assert opened == [*paths, paths[0]]
    files = OpenFiles(most_bytes=40)
    for _ in range(9):  # 16 bytes each
        files.tensor(paths[0], "x")
    assert 3 <= len(opened) - len(paths) - 1 <= 4
