"""Weight files from the raw bytes of others: no tensor is held in memory."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ria_vllm.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE
from ria_vllm.errors import RiaError

Entry = tuple[str, dict[str, Any], Path, int]  # name, header entry, file, where its bytes begin


def tensor_entries(path: Path) -> list[Entry]:
    """The tensors of a safetensors file by their header (8 bytes of length, JSON, then raw data), in file order."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = [(name, entry, path, 8 + length + entry["data_offsets"][0]) for name, entry in header.items()]
    return sorted(found, key=lambda e: e[3])


def _size(entry: dict[str, Any]) -> int:
    return entry["data_offsets"][1] - entry["data_offsets"][0]


def weights_digest(entries: Sequence[Entry]) -> str:
    """SHA-256 which tells the weights of one run from those of another, however they are divided into files.

    Hashed are, for each tensor in sorted order of the names, the name as UTF-8, a zero byte and the tensor's first
    65,536 bytes: reading all would take as long as copying it.
    """
    found = hashlib.sha256()
    for name, entry, path, start in sorted(entries, key=lambda e: e[0]):
        with open(path, "rb") as file:
            file.seek(start)
            found.update(name.encode() + b"\0" + file.read(min(_size(entry), 1 << 16)))
    return found.hexdigest()


def copy_tensors(entries: Sequence[Entry], path: Path, metadata: dict[str, str] | None = None) -> None:
    """One safetensors file from the raw bytes of others."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    offset = 0
    for name, entry, _, _ in entries:
        size = _size(entry)
        header[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for _, entry, source, start in entries:
            with open(source, "rb") as file:
                file.seek(start)
                left = _size(entry)
                while left:
                    block = file.read(min(left, 1 << 22))
                    if not block:
                        raise RiaError(f"{source}: ends too early. Run the same command again without --resume.")
                    target.write(block)
                    left -= len(block)


def write_shards(entries: Sequence[Entry], folder: Path, max_shard_size: int, metadata: dict[str, str]) -> None:
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        size = _size(entry[1])
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    if len(shards) == 1:
        copy_tensors(shards[0], folder / SINGLE_FILE, metadata)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        copy_tensors(shard, folder / file, metadata)
        weight_map |= {name: file for name, _, _, _ in shard}
    total = sum(_size(entry[1]) for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
