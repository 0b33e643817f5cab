"""A server of `proved_model`, as far as loading weights goes: vLLM's own functions under our plugin."""

import inspect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from proved_model import Checkpoint, Model
from vllm.config import LoadConfig, get_current_vllm_config
from vllm.model_executor.model_loader import utils, weight_utils
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ria_vllm.serve import plugin
from ria_vllm.serve.model import checkpoint_files
from ria_vllm.serve.model.config import RiaConfig

IDS = torch.arange(11)
HERE = SimpleNamespace(model="the folder", revision=None, dtype=torch.float32, quantization="ria", hf_config=None,
                       runner_type="generate", head_dtype=torch.float32,
                       word_embeddings_untied_by_checkpoint=False)  # fmt: skip


def watch(monkeypatch):
    """Register the plugin for this test, with one rank."""
    from vllm.model_executor.layers import vocab_parallel_embedding as embeddings
    from vllm.model_executor.layers.fused_moe import config as moe_config

    for module in (embeddings, moe_config, weight_utils):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0, raising=False)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 1, raising=False)
    monkeypatch.setattr(embeddings, "tensor_model_parallel_all_reduce", lambda x: x)
    # vLLM's own: another test of this process may have registered the plugin already.
    own = inspect.unwrap(utils.record_metadata_for_reloading)
    monkeypatch.setattr(utils, "record_metadata_for_reloading", own)
    monkeypatch.setattr(RiaConfig, "check_unchanged", lambda *_: None)  # there are no files
    monkeypatch.setattr(checkpoint_files, "proofs_of", Server.proofs_of)
    monkeypatch.setattr(get_current_vllm_config(), "model_config", HERE)
    plugin.watch_models()


@dataclass
class Server:
    """A server of a checkpoint, as far as weights go."""

    read: ClassVar[tuple]
    checkpoint: Checkpoint
    model: Model

    @classmethod
    def proofs_of(cls, *_):
        """Those of the files that were read last."""
        checkpoint, tensors = cls.read
        return checkpoint.proofs(tensors)

    @classmethod
    def started(cls, checkpoint, training, monkeypatch):
        """With the weights of a training."""
        config = get_current_vllm_config()
        for kind in ("dtype", "head_dtype"):
            monkeypatch.setattr(HERE, kind, checkpoint.stored.dtype)
        config.additional_config = {"tied": checkpoint.tied, "dtype": checkpoint.stored.dtype}
        monkeypatch.setattr(config, "quant_config", checkpoint.config())
        config.quant_config.where = HERE.model
        server = cls(checkpoint, utils.initialize_model(config, model_class=Model, model_config=None))
        server.model.load_weights(server.files(checkpoint.tensors(training).items()))
        utils.process_weights_after_loading(server.model, HERE, torch.device("cpu"))
        return server

    def files(self, tensors):
        """As vLLM's loader reads them."""
        Server.read = self.checkpoint, dict(tensors)
        loader = DefaultModelLoader(LoadConfig())
        loader._get_weights_iterator = lambda source: ((name, tensor.clone()) for name, tensor in tensors)
        return loader.get_all_weights(HERE, self.model)

    @torch.no_grad()
    def logits(self):
        return self.model.compute_logits(self.model(IDS)).clone()
