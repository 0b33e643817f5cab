"""Folders that `tiny.write` wrote, for tests of what is read before the weights."""

import json
from types import SimpleNamespace

import torch
from damage import rewrite
from safetensors.torch import load_file
from vllm.config import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ria_vllm.checkpoint.weight_files import SINGLE_FILE
from ria_vllm.format import permutation
from ria_vllm.format.schema import DIGESTS, PERMUTATIONS_FILE
from ria_vllm.serve.model.config import RiaConfig


def config_of(folder) -> RiaConfig:
    config = RiaConfig.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    config.maybe_update_config(str(folder))
    return config


def rebind(folder):
    """Give a folder with changed permutations the digest of these."""
    stored = load_file(folder / PERMUTATIONS_FILE)
    digest = permutation.digest({name.removesuffix(".input_permutation"): p for name, p in stored.items()})
    rewrite(folder / SINGLE_FILE, lambda tensors: None, **{DIGESTS["permutations_digest"]: digest})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["permutations_digest"] = digest
    (folder / "config.json").write_text(json.dumps(config))


class Collecting(torch.nn.Module):
    """Stands in for a model: it keeps what it loads, and calls `meanwhile` after the first tensor."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.loaded, self.meanwhile = [], lambda: None

    def load_weights(self, weights):
        for name, _ in weights:
            if not self.loaded:
                self.meanwhile()
            self.loaded.append(name)


def files(model, folder):
    """What vLLM reads from a folder, lazily."""
    loader = DefaultModelLoader(LoadConfig(use_tqdm_on_load=False))
    return loader.get_all_weights(SimpleNamespace(model=str(folder), revision=None), model)
