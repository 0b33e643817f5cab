"""Linears as the last compressed-tensors that wrote 2:4 stores them, by its own code.

vLLM requires a newer one. `make` puts the old one into a folder of its own, and it runs in a process of its own:
`python compressed_tensors_writer.py JOBS.json IN.safetensors OUT.safetensors` with that folder first on PYTHONPATH.

A job: {"name", "format", "weights": arguments of QuantizationArgs}. For each, IN has NAME.weight and NAME.weight_scale.
OUT has what a checkpoint has, and the weight that it stands for as compressed-tensors dequantizes it: NAME.dense in the
dtype of the scales, and NAME.exact in float32.
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
FOLDER = Path(__file__).parents[2] / ".work" / f"compressed-tensors-{VERSION}"

# In CI (which sets this variable everywhere) the comparison must not vanish: without the writer, its tests fail there.
needs_writer = pytest.mark.skipif(
    not FOLDER.is_dir() and not os.environ.get("CI"), reason=f"compressed-tensors {VERSION} is not in .work; run make"
)


@dataclass
class Writer:
    """Collects linears, and has them stored in one process."""

    jobs: list[dict[str, Any]] = field(default_factory=list)
    given: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, form: str, weights: dict[str, Any], weight: torch.Tensor, scale: torch.Tensor) -> None:
        self.jobs.append({"name": name, "format": form, "weights": weights})
        self.given |= {f"{name}.weight": weight.clone(), f"{name}.weight_scale": scale.clone()}

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
    largest = 2 ** (weights["num_bits"] - 1) - 0.5
    groups = weight.float().unflatten(1, (-1, weights.get("group_size") or weight.shape[1])).abs().amax(-1)
    return ((groups.amax()[None] if weights["strategy"] == "tensor" else groups) / largest).to(weight.dtype)


def main(jobs: str, given: str, out: str) -> None:
    import compressed_tensors
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    assert compressed_tensors.__version__ == VERSION, compressed_tensors.__version__
    tensors, stored = load_file(given), {}
    for job in json.loads(Path(jobs).read_text()):
        name, args = job["name"], QuantizationArgs(**job["weights"])
        state = {part: tensors[f"{name}.{part}"] for part in ("weight", "weight_scale")}
        if job["format"] == "marlin-24":  # it rounds scales to float16 first
            state = {part: tensor.half() for part, tensor in state.items()}
        compressor = BaseCompressor.load_from_registry(job["format"])
        scheme = {name: QuantizationScheme(targets=["Linear"], weights=args)}
        stored |= compressor.compress({f"{name}.{part}": tensor.clone() for part, tensor in state.items()}, scheme)
        integers = quantize(x=state["weight"], scale=state["weight_scale"], zero_point=None, args=args)
        stored[f"{name}.dense"] = dequantize(x_q=integers, scale=state["weight_scale"], args=args)
        stored[f"{name}.exact"] = dequantize(x_q=integers, scale=state["weight_scale"].float(), args=args)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
