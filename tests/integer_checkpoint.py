"""A compressed folder of floating-point values, rewritten with integers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from damage import prove, rewrite

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.weight_files import INDEX_FILE
from ria_vllm.format import sparse24
from ria_vllm.format.formats import IntFormat
from ria_vllm.format.schema import INT8_TOKENS
from ria_vllm.format.weight_format import name_of


def with_integers(source, out: Path, format: IntFormat, rounds_inputs: bool):
    """The same model with integer weights, as `conftest.PrunedLlama`; `source` is one with several shards."""
    shutil.copytree(source.folder, out)
    index = json.loads((out / INDEX_FILE).read_text())
    floats, dtypes = Reader(source.folder), set()

    def change(tensors):
        for name in [stored.removesuffix(".compressed") for stored in tensors if stored.endswith(".compressed")]:
            linear = floats.linear(name)
            dtypes.add(name_of(linear.dtype))
            weight, scales = format.quantize(linear.stored(), linear.dtype)
            parts = format.encode(weight, sparse24.mask_from_bitmask(linear.parts["bitmask"]), scales)
            tensors.update({f"{name}.{part}": parts[part] for part in ("compressed", "weight_scale")})
            index["weight_map"][f"{name}.weight_scale"] = index["weight_map"][f"{name}.compressed"]

    for path in sorted(out.glob("model-*.safetensors")):
        rewrite(path, change)
    (out / INDEX_FILE).write_text(json.dumps(index))
    (dtype,) = dtypes
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["weights"] = {**format.quantization, "dtype": dtype}
    if rounds_inputs:
        config["quantization_config"]["input_activations"] = INT8_TOKENS.model_dump()
    (out / "config.json").write_text(json.dumps(config))
    prove(out)
    reader = Reader(out)
    dense = {f"{name}.weight": reader.dense(name) for name in reader.sparse_names}
    for name, weight in dense.items():  # a folder to damage, not an oracle; but it has to be about right
        assert torch.equal(weight != 0, (source.dense[name] != 0) & (weight != 0))
        assert (weight - source.dense[name]).float().norm() < 0.2 * source.dense[name].float().norm()
    return replace(source, folder=out, dense=source.dense | dense)
