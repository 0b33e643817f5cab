"""What one model type goes through, outside vLLM: build, compress, verify, export; and what was pruned and folded."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from families import TEXT as SENTENCE
from safetensors import safe_open
from zoo.agreement import load, prompts
from zoo.toy import ROUTERS, Toy, build

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.export import export_dense
from ria_vllm.format.sparse24 import IN_FEATURES_MULTIPLE
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.progress import Monitor

DECODER = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")
ELSEWHERE = re.compile(r"vision|visual|audio|image|mtp\.")
NUMBER = re.compile(r"\.\d+(?=\.|$)")


def pattern(name: str) -> str:
    """A name without the numbers of its layer and expert."""
    return NUMBER.sub(".*", name)


def matrices(folder: Path) -> dict[str, torch.Size]:
    """The weights of the text decoder's layers in the dense files that are not vectors: name -> shape."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                shape = torch.Size(file.get_slice(name).get_shape())
                if DECODER.search(name) and not ELSEWHERE.search(name) and sum(size > 1 for size in shape) > 1:
                    found[name] = shape
    return found


def exempt(toy: Toy, name: str, shape: torch.Size) -> str:
    """Why a matrix may stay dense; "" if it may not."""
    for part, reason in toy.stays_dense.items():
        if part in name:
            return reason
    if any(part in name for part in ROUTERS):
        return "router"
    if "conv" in name and len(shape) > 2:
        return "convolution"
    if "embed" in name:
        return "embedding"
    if min(shape[-2:]) < IN_FEATURES_MULTIPLE:
        return "tiny"
    return "odd-sized" if shape[-1] % IN_FEATURES_MULTIPLE else ""


def describe(toy: Toy, dense: Path, reader: Reader) -> dict[str, Any]:
    """Shares and folds of a compressed folder, from the names and shapes in the files alone."""
    found = matrices(dense)
    pruned = found.keys() - set(reader.dense_names)
    reasons = {name: exempt(toy, name, shape) for name, shape in found.items() if name not in pruned}
    weights = {name: shape.numel() for name, shape in found.items()}
    counted = sum(number for name, number in weights.items() if not reasons.get(name))
    sparse = set(reader.sparse_names)
    folded = {name for name, _, _ in reader.schema.active_folds(reader.permuted_names, sparse)}
    gathered = {name for name in reader.permuted_names if name not in folded}
    stored = sum(math.prod(reader.linear(name).shape) for name in sparse)
    assert stored == sum(weights[name] for name in pruned), (
        "the pruned linears are not the dense matrices that are gone"
    )
    return {
        "share": sum(weights[name] for name in pruned) / max(counted, 1),
        "share_of_all": stored / max(sum(weights.values()), 1),
        "folded": patterns(folded),
        "gathered": patterns(gathered),
        "dense": {reason or "missed": patterns(n for n, r in reasons.items() if r == reason)
                  for reason in sorted(set(reasons.values()))},
    }  # fmt: skip


def patterns(names: Iterable[str]) -> list[str]:
    return sorted({pattern(name.removesuffix(".weight")) for name in names})


class Warnings(Monitor):
    """Shows nothing, and keeps the warnings."""

    def __init__(self) -> None:
        super().__init__(shown=False)
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def calibration(work: Path) -> Path:
    path = work / "words.txt"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        path.write_text(SENTENCE * 200)
    return path


def dense_folder(name: str, toy: Toy, work: Path) -> Path:
    return build(toy.model_type or name, toy, work / name / "dense")


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Their tensors are the same, and so are their logits, but for the alignment of tensors in memory."""
    tensors = other.state_dict()
    assert one.state_dict().keys() == tensors.keys()
    different = [name for name, tensor in one.state_dict().items() if not torch.equal(tensor, tensors[name])]
    assert not different, f"transformers reads other weights from the two folders: {different}"
    ids = torch.tensor([prompts()[-1]])
    with torch.no_grad():
        first, second = (model(input_ids=ids, use_cache=False).logits for model in (one, other))
    assert torch.allclose(first, second, atol=1e-4), f"their logits differ by {(first - second).abs().max():.2g}"


def pruned_folders(name: str, toy: Toy, work: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Compress, verify, export, and compare transformers on both folders.

    Returns:
        The compressed folder, the exported one, and what `describe` says.
    """
    dense, out, exported = (work / name / kind for kind in ("dense", "pruned", "exported"))
    recipe = Recipe(calibration=str(calibration(work)), samples=8, seq_len=64, reconstruct="none")
    monitor = Warnings()
    compress(str(dense), out, recipe, Settings(overwrite=True), monitor)
    reader = Reader(out)
    problems = list(reader.problems())
    assert not problems, problems[:3]
    export_dense(reader, exported, 1 << 40, overwrite=True)
    assert_same(load(out, toy), load(exported, toy))
    return out, exported, describe(toy, dense, reader) | {"warnings": monitor.warnings}
