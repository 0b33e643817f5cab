"""Shared by tests that run `compress`: changed models, interrupted runs, and checks that a result is complete."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.export import export_dense
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.progress import Monitor

TOKENS = torch.arange(2, 60)[None]


class WarningRecorder(Monitor):
    """Shows nothing, and keeps the warnings and what else is said."""

    def __init__(self, **options: Any):
        super().__init__(shown=False, **options)
        self.warnings: list[str] = []
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def run_small(
    model: Path | str, out: Path, text: Path | str, settings: Settings = Settings(), **options
) -> tuple[dict, list[str]]:
    """Compress with little text and no reconstruction, unless `options` say otherwise; the report and the warnings. The
    card never says that something was not measured."""
    recipe = Recipe(**{"calibration": str(text), "samples": 4, "seq_len": 32, "reconstruct": "none"} | options)
    monitor = WarningRecorder()
    report = compress(str(model), out, recipe, settings, monitor)
    assert "not measured" not in (out / "README.md").read_text()
    return report, monitor.warnings


@contextmanager
def interrupted_after_a_layer() -> Iterator[None]:
    """Interrupt the `compress` inside, as Ctrl-C would, when it has finished its first layer."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ria_vllm.offline.run.compress.say_layer", interrupt)
        yield


def digests(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, without subfolders."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weight_digests(folder: Path) -> dict[str, str]:
    """Those of the files with tensors."""
    return {name: digest for name, digest in digests(folder).items() if name.endswith(".safetensors")}


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A private copy of a tiny Llama."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict], Any]) -> None:
    """Change a model's tensors by `change`, which edits the dictionary in place or returns another one."""
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors)
    tensors = changed if isinstance(changed, dict) else tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edited(source: Path, folder: Path, change: Callable[[dict], Any], **config) -> Path:
    """A copy of a model, with its tensors changed by `change` (see `edit_weights`) and config.json by `config`."""
    shutil.copytree(source, folder)
    edit_weights(folder, change)
    edit_config(folder, **config)
    return folder


def under_language_model(name: str) -> str:
    """A tensor's name as in Qwen 3.5 on the hub, where the text model is under language_model."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def linears_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views of the same tensors. Stacked experts, as Llama 4 has them ([experts, in, out]), are linears [out, in]."""
    found = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if not (module.endswith(".experts") and tensor.dim() == 3):
            found[name] = tensor
            continue
        for number, expert in enumerate(tensor.mT):
            parts = zip(("gate_proj", "up_proj"), expert.chunk(2)) if kind == "gate_up_proj" else [(kind, expert)]
            found |= {f"{module}.{number}.{leaf}.weight": part for leaf, part in parts}
    return found


def check_complete(source: Path, out: Path) -> Reader:
    """Each tensor of the source is in the output once, under its own name; dense ones are equal bit by bit."""
    reader = Reader(out)
    assert list(reader.problems()) == []
    original = linears_of(load_file(source / "model.safetensors"))
    assert {*reader.dense_names, *(f"{name}.weight" for name in reader.sparse_names)} == set(original)
    assert not {f"{name}.weight" for name in reader.sparse_names} & set(reader.files)
    for name in reader.dense_names:
        assert torch.equal(reader.tensor(name), original[name])
    for name in reader.sparse_names:
        dense = reader.linear(name).dense()
        assert torch.equal(dense, original[f"{name}.weight"] * (dense != 0))
    assert not any(reader.schema.ignored(name) for name in reader.sparse_names)
    return reader


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(TOKENS).logits


def weight_of(model: torch.nn.Module, name: str) -> torch.Tensor:
    """The weight of a linear, also of an expert's, which is a part of a stack [experts, out, in]."""
    if ".experts." not in name:
        return model.get_submodule(name).weight
    module, number, leaf = name.rsplit(".", 2)
    experts = model.get_submodule(module)
    kind = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(leaf, leaf)
    if hasattr(experts, kind):
        return getattr(experts, kind)[int(number)]
    return experts.gate_up_proj[int(number)].chunk(2)[("gate_proj", "up_proj").index(kind)]


def logits_of_pruned(source: Path, reader: Reader, inside: Callable[[str], str] = lambda name: name) -> torch.Tensor:
    """The logits of the original model with its linears pruned in memory.

    Args:
        inside: a linear's name in the files -> in transformers' model.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        for name in reader.sparse_names:
            weight_of(model, inside(name)).copy_(reader.linear(name).dense())
        return model(TOKENS).logits


def check_export(source: Path, reader: Reader, folder: Path, inside: Callable[[str], str] = lambda name: name) -> None:
    """In transformers, the compressed folder, the exported one and the original pruned in memory compute the same."""
    expected = logits_of_pruned(source, reader, inside)
    export_dense(reader, folder, 1 << 40)
    assert torch.equal(logits(folder), expected) and torch.equal(logits(reader.folder), expected)
    assert not torch.allclose(expected, logits(source), atol=1e-2)
