"""What the last compressed-tensors with 2:4 weights reads, by its own code.

`python compressed_tensors_reader.py FOLDER OUT` with that version first on PYTHONPATH writes a model's dense tensors.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from compressed_tensors_writer import FOLDER, VERSION
from safetensors.torch import load_file, save_file


def read(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    environment = os.environ | {"PYTHONPATH": str(FOLDER)}
    subprocess.run([sys.executable, __file__, str(folder), str(out)], env=environment, check=True, timeout=300)
    return load_file(out)


def main(folder: str, out: str) -> None:
    import compressed_tensors
    from compressed_tensors.compressors import ModelCompressor
    from transformers import AutoConfig, AutoModelForCausalLM

    assert compressed_tensors.__version__ == VERSION, compressed_tensors.__version__
    config = AutoConfig.from_pretrained(folder)
    words = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    # transformers loads what is plain, and leaves the rest to it.
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False)
    ModelCompressor.from_compression_config(words).decompress(folder, model)
    save_file({name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
