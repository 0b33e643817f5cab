"""Mixtures of experts as compressed-tensors 0.12 itself stored them."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mixtures
import torch
from compressed_tensors_writer import Writer
from mixture_layers import EXPERTS, HIDDEN, INNER, KINDS, LAYER, StoredMixture
from packed_checkpoints import Packed, quantization_config
from safetensors.torch import save_file

from ria_vllm.serve.model.config import RiaConfig

SPARSE = {"format": "dense", "sparsity_structure": "2:4", "global_sparsity": 0.5, "targets": ["Linear"], "ignore": []}
BITMASK = SPARSE | {"format": "sparse-24-bitmask"}


class ForeignMixture(StoredMixture):
    """Experts of one layer: the tensors of the files, and the plain matrices that they stand for.

    Args:
        how: they are stored.
        ends: of the names of gate, up and down.
        stored: what the writer made of them, by `NUMBER/NAME.PART` with this number.
    """

    def __init__(self, how: Packed, ends: Mapping[str, str], stored: dict[str, Any], number: int):
        self.how, self.bias = how, {}
        mine = {name.partition("/")[2]: tensor for name, tensor in stored.items() if name.startswith(f"{number}/")}
        self.plain = {
            f"{LAYER}.{e}.{end}": mine.pop(f"{LAYER}.{e}.{ends[kind]}.exact").double()
            for e in range(EXPERTS) for kind, end in KINDS.items()
        }  # fmt: skip
        self.tensors = {name: tensor for name, tensor in mine.items() if not name.endswith(".dense")}

    def config(self, **changes: Any) -> RiaConfig:
        config = RiaConfig.from_config(quantization_config(replace(self.how, **changes)))
        config._read_names(list(self.tensors))
        config.names = {name: name for name in config.stored}
        config.packed_modules_mapping = {}
        return config


def layers(folder: Path, cases: Mapping[str, Packed], ends: Mapping[str, str] = KINDS) -> dict[str, ForeignMixture]:
    """One layer for each case."""
    writer = Writer()
    for number, how in enumerate(cases.values()):
        for e in range(EXPERTS):
            for seed, (kind, end) in enumerate(ends.items()):
                shape = (HIDDEN, INNER) if kind == "down" else (INNER, HIDDEN)
                how.add(writer, f"{number}/{LAYER}.{e}.{end}", shape, 10 * e + seed)
    stored = writer.run(folder)
    return {name: ForeignMixture(how, ends, stored, i) for i, (name, how) in enumerate(cases.items())}


# Half of any linear's columns are whole groups of 128.
SIZES = (("hidden_size", 256), ("head_dim", 128), ("intermediate_size", 256))
INNER_SIZE = ("moe_intermediate_size", 256)


def write(folder: Path, cases: Mapping[str, tuple[str, Packed]]) -> dict[str, tuple[Path, Path]]:
    """Small models, each of a family of `mixtures`; their folders, and dense ones with the same weights."""
    writer, dense, found = Writer(), {}, {}
    for number, (name, (family, how)) in enumerate(cases.items()):
        of_family = mixtures.FAMILIES[family]
        inner = (INNER_SIZE,) if INNER_SIZE[0] in dict(of_family.settings) else ()
        found[name] = folder / str(number), folder / f"dense{number}"
        of_family = replace(of_family, settings=(*of_family.settings, *SIZES, *inner))
        dense[name] = mixtures.save_dense(of_family, found[name][1])
        for seed, linear in enumerate(linears(dense[name], how)):
            how.add(writer, f"{number}/{linear}", dense[name][f"{linear}.weight"].shape, seed)
    stored = writer.run(folder / "written")
    for number, (name, (_, how)) in enumerate(cases.items()):
        mine = {key.partition("/")[2]: tensor for key, tensor in stored.items() if key.startswith(f"{number}/")}
        plain = {f"{linear}.weight": mine.pop(f"{linear}.exact") for linear in linears(dense[name], how)}
        out, oracle = found[name]
        shutil.copytree(oracle, out)
        save_file(dense[name] | plain, oracle / "model.safetensors", {"format": "pt"})
        others = {key: tensor for key, tensor in dense[name].items() if key not in plain}
        mine = {key: tensor for key, tensor in mine.items() if not key.endswith(".dense")}
        save_file(others | mine, out / "model.safetensors", {"format": "pt"})
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"] = quantization_config(how)
        (out / "config.json").write_text(json.dumps(config))
    return found


def linears(tensors: Mapping[str, torch.Tensor], how: Packed) -> list[str]:
    """The linears that are stored in this way."""
    names = [key.removesuffix(".weight") for key in sorted(tensors) if ".layers." in key and tensors[key].dim() == 2]
    patterns = [entry.removeprefix("re:") for entry in how.ignored if entry.startswith("re:")]
    return [name for name in names if not any(re.match(pattern, name) for pattern in patterns)]
