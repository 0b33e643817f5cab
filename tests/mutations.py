"""Random changes of a compressed folder, as hypothesis strategies: what an accident or an attacker may do to it."""

import copy
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch
from damage import bind, rewrite
from hypothesis import HealthCheck, settings

DELETE = "<delete>"
ODD_VALUES = [
    DELETE, None, True, False, 0, 1, 2, -1, 2**31, 2**70, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "0", "²",
    "re:(a+)+$", "{i}", "{i}.{i}.{i}", "model.layers.{i}.mlp.up_proj", "\x1b[2J", "\ud800", "\0", "a" * 5000, "../x",
    "[/]", "none", "lsa", "bfloat16", "int8", "ria", "F8_E4M3", "F4", "C64", "I32", "0" * 64, [], [[]], [0], [1, 2, 3],
    [2**62, 0], {}, {"a": 1}, {"self": 1}, {"name": "a", "rows": [2**70, 0]},
]  # fmt: skip
TENSOR_CHANGES = {
    "transposed": lambda t: t.t() if t.dim() == 2 else t,
    "flat": lambda t: t.flatten(),
    "empty": lambda t: t[:0] if t.dim() else t,
    "scalar": lambda t: t.flatten()[0] if t.numel() else t,
    "shorter": lambda t: t[:-1] if t.dim() else t,
    "narrower": lambda t: t[..., :-1] if t.dim() else t,
    "with an axis": lambda t: t[None],
    "zero": torch.zeros_like,
    "reversed": lambda t: t.flip(0) if t.dim() else t,
    "plus one": lambda t: t + 1,
    "negative": lambda t: -t,
    "infinite": lambda t: (t.float() * float("inf")).to(t.dtype),
    **{
        str(dtype): lambda t, dtype=dtype: t.float().to(dtype)
        for dtype in (torch.bool, torch.int8, torch.uint8, torch.int32, torch.int64, torch.uint16, torch.float16,
                      torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64)
    },
}  # fmt: skip
FILES = ("config.json", "model.safetensors.index.json", "ria_report.json", "permutations.safetensors", "shard")


@dataclass(frozen=True)
class Mutation:
    """kind: json, header, tensor, bytes or file. where: picks what is changed. change: what it becomes."""

    kind: str
    file: str
    where: int
    change: Any

    def apply(self, folder: Path, other: Path, inside: str | None) -> None:
        """Change `folder`; `other` holds another run of the model. inside: the only key of config.json to change."""
        shards = sorted(folder.glob("model-*.safetensors"))
        path = shards[self.where % len(shards)] if self.file == "shard" and shards else folder / self.file
        if not path.is_file():
            return
        try:
            getattr(self, f"_{self.kind}")(path, other, inside)
        except Exception:  # an earlier change of the file left nothing to change in this way
            pass

    def _json(self, path: Path, other: Path, inside: str | None) -> None:
        content = json.loads(path.read_text())
        self._replace(content[inside] if inside and path.name == "config.json" else content)
        path.write_text(json.dumps(content))

    def _header(self, path: Path, other: Path, inside: str | None) -> None:
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        self._replace(header)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])

    def _replace(self, content: Any) -> None:
        places = list(_places(content))
        container, key = places[self.where % len(places)]
        if self.change == DELETE:
            del container[key]
        else:
            container[key] = copy.deepcopy(self.change)

    def _tensor(self, path: Path, other: Path, inside: str | None) -> None:
        def change(tensors):
            name = sorted(tensors)[self.where % len(tensors)]
            tensors[name] = TENSOR_CHANGES[self.change](tensors[name]).contiguous()

        rewrite(path, change)

    def _bytes(self, path: Path, other: Path, inside: str | None) -> None:
        raw = bytearray(path.read_bytes())
        at = self.where % min(len(raw), 4000) if self.where % 2 else self.where % len(raw)
        raw[at:] = {"flip": raw[at:], "cut": b"", "more": b"\x7f" * 9 + raw[at:]}[self.change]
        if self.change == "flip":
            raw[at] ^= 1 << self.where % 8
        path.write_bytes(raw)

    def _file(self, path: Path, other: Path, inside: str | None) -> None:
        if self.change == "of the other run":
            shutil.copyfile(other / path.name, path)
        elif self.change == "gone":
            path.unlink()
        else:
            files = sorted(path.parent.iterdir())
            shutil.copyfile(files[self.where % len(files)], path)


def _places(content: Any):
    """Every (container, key) of parsed JSON."""
    pairs = list(content.items()) if isinstance(content, dict) else list(enumerate(content))
    for key, value in pairs:
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _of(kind: str, files: tuple[str, ...], changes: Any) -> st.SearchStrategy[Mutation]:
    return st.builds(Mutation, st.just(kind), st.sampled_from(files), st.integers(0, 2**30), changes)


mutation = st.one_of(
    _of("json", FILES[:3], st.sampled_from(ODD_VALUES)),
    _of("json", FILES[:1], st.sampled_from(ODD_VALUES)),
    _of("header", FILES[3:], st.sampled_from(ODD_VALUES)),
    _of("tensor", FILES[3:], st.sampled_from(sorted(TENSOR_CHANGES))),
    _of("bytes", FILES, st.sampled_from(["flip", "cut", "more"])),
    _of("file", FILES, st.sampled_from(["of the other run", "gone", "of another file"])),
    _of("file", ("config.json", "permutations.safetensors", "shard"), st.just("of the other run")),
)


@dataclass(frozen=True)
class Damaged:
    """crafted: the digests are made to fit afterwards, as an attacker would."""

    mutations: list[Mutation]
    crafted: bool

    def make(self, folder: Path, other: Path, out: Path, inside: str | None = None) -> Path:
        shutil.copytree(folder, out)
        (out / "ria_report.json").write_text(
            json.dumps({"linears": {"model.layers.0.mlp.up_proj": {"retained_after": 0.5}}})
        )
        for mutation in self.mutations:
            mutation.apply(out, other, inside)
        if self.crafted:
            try:
                bind(out)
            except Exception:  # nothing left to bind
                pass
        return out


damaged = st.builds(Damaged, st.lists(mutation, min_size=1, max_size=2), st.booleans())


def examples(number: int):
    """The same `number` of cases on every run. RIA_VLLM_EXAMPLES=N asks for N times as many, new ones on each run."""
    more = int(os.environ.get("RIA_VLLM_EXAMPLES", "1"))
    return settings(
        max_examples=number * more, derandomize=more == 1, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def other_run(folder: Path, out: Path) -> Path:
    """A copy of a sound folder with another permutation and digests that fit: what a second run might have written."""
    shutil.copytree(folder, out)

    def change(tensors):
        name = sorted(tensors)[0]
        tensors[name] = tensors[name].flip(0).contiguous()

    rewrite(out / "permutations.safetensors", change)
    bind(out)
    return out
