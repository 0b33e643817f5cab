"""Linears as the last compressed-tensors that wrote 2:4 stores them, by its own code.

vLLM requires a newer one. `make` puts the old one into a folder of its own, and it runs in a process of its own:
`python compressed_tensors_writer.py JOBS.json IN.safetensors OUT.safetensors` with that folder first on PYTHONPATH.

A job: {"name", "format", "weights": arguments of QuantizationArgs, null if it is not quantized, "sparse": whether it is
stored as sparse-24-bitmask}. For each, IN has NAME.weight and perhaps NAME.weight_scale. OUT has what a checkpoint has,
and the weight that it stands for as compressed-tensors dequantizes it: NAME.dense in the dtype of the scales, and
NAME.exact in float32.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

VERSION = "0.12.2"
FOLDER = Path(__file__).parents[1] / ".work" / f"compressed-tensors-{VERSION}"

# In CI (which sets this variable everywhere) the comparison must not vanish: without the writer, its tests fail there.
needs_writer = pytest.mark.skipif(
    not FOLDER.is_dir() and not os.environ.get("CI"), reason=f"compressed-tensors {VERSION} is not in .work; run make"
)


@dataclass
class Writer:
    """Collects linears, and has them stored in one process."""

    jobs: list[dict[str, Any]] = field(default_factory=list)
    given: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(
        self, name: str, form: str, weights: dict[str, Any] | None, weight: torch.Tensor, scale: torch.Tensor | None,
        sparse: bool = False,
    ) -> None:  # fmt: skip
        self.jobs.append({"name": name, "format": form, "weights": weights, "sparse": sparse})
        self.given[f"{name}.weight"] = weight.clone()
        if scale is not None:
            self.given[f"{name}.weight_scale"] = scale.clone()

    def run(self, folder: Path) -> dict[str, torch.Tensor]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "jobs.json").write_text(json.dumps(self.jobs))
        save_file(self.given, folder / "in.safetensors")
        files = [str(folder / name) for name in ("jobs.json", "in.safetensors", "out.safetensors")]
        environment = os.environ | {"PYTHONPATH": str(FOLDER)}
        subprocess.run([sys.executable, __file__, *files], env=environment, check=True, timeout=300)
        return load_file(folder / "out.safetensors")


def random_24(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A random 2:4 matrix. Some groups of four have fewer than two non-zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns // 4, 4, generator=generator)
    weight.scatter_(-1, torch.rand(weight.shape, generator=generator).argsort(-1)[..., :2], 0.0)
    weight[torch.rand(weight.shape, generator=generator) < 0.1] = 0
    return weight.flatten(1).to(dtype)


def scales_of(weight: torch.Tensor, weights: dict[str, Any]) -> torch.Tensor:
    """The scales that fit the largest magnitudes: [out, 1], [out, in/group_size], or one."""
    largest = 448 if weights["type"] == "float" else 2 ** (weights["num_bits"] - 1) - 0.5
    groups = weight.float().unflatten(1, (-1, weights.get("group_size") or weight.shape[1])).abs().amax(-1)
    return ((groups.amax()[None] if weights["strategy"] == "tensor" else groups) / largest).to(weight.dtype)


def main(jobs: str, given: str, out: str) -> None:
    import compressed_tensors
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import Sparse24BitMaskConfig

    assert compressed_tensors.__version__ == VERSION, compressed_tensors.__version__
    tensors, stored = load_file(given), {}
    for job in json.loads(Path(jobs).read_text()):
        name = job["name"]
        if job["weights"] is None:
            weight = tensors[f"{name}.weight"]
            made, meant = {f"{name}.weight": weight}, {"dense": weight, "exact": weight.float()}
        else:
            made, meant = quantized(job, tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"])
        if job["sparse"]:
            config = Sparse24BitMaskConfig(sparsity_structure="2:4")
            sparse = BaseCompressor.load_from_registry("sparse-24-bitmask", config=config)
            made = sparse.compress(made)
            # It loses -128, which is its own magnitude in int8. What counts is what it reads.
            parts = {part: made[f"{name}.{part}"] for part in ("shape", "compressed", "bitmask")}
            zeros = sparse.decompress_weight(parts).float() == 0
            meant = {part: tensor.masked_fill(zeros, 0) for part, tensor in meant.items()}
        stored |= made | {f"{name}.{part}": tensor for part, tensor in meant.items()}
    save_file({name: tensor.contiguous().clone() for name, tensor in stored.items()}, out)


def quantized(
    job: dict[str, Any], weight: torch.Tensor, scale: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a linear by their whole names, and what they stand for."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    name, args = job["name"], QuantizationArgs(**job["weights"])
    if job["format"] == "marlin-24":  # it rounds scales to float16 first
        weight, scale = weight.half(), scale.half()
    compressor = BaseCompressor.load_from_registry(job["format"])
    scheme = {name: QuantizationScheme(targets=["Linear"], weights=args)}
    state = {f"{name}.weight": weight.clone(), f"{name}.weight_scale": scale.clone()}
    values = quantize(x=weight, scale=scale, zero_point=None, args=args)
    meant = {
        "dense": dequantize(x_q=values, scale=scale, args=args),
        "exact": dequantize(x_q=values, scale=scale.float(), args=args),
    }
    return compressor.compress(state, scheme), meant


if __name__ == "__main__":
    main(*sys.argv[1:])
