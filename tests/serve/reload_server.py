"""A server of `reload_model`, as far as loading and reloading weights goes: vLLM's own functions under our plugin."""

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from reload_model import Checkpoint, Model
from vllm.config import LoadConfig, get_current_vllm_config
from vllm.model_executor.model_loader import reload as vllm_reload
from vllm.model_executor.model_loader import utils, weight_utils
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.reload import layerwise

from ria_vllm.errors import RiaError
from ria_vllm.serve import plugin
from ria_vllm.serve.model import reload
from ria_vllm.serve.reload.watching import holders, watch_reloads, watch_worker

IDS = torch.arange(11)
BEGIN = "initialize_layerwise_reload"
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
    for module, names in (
        (utils, ["record_metadata_for_reloading"]),
        (layerwise, ["_layerwise_process", "finalize_layerwise_processing"]),
        *((module, [BEGIN]) for module in holders(getattr(layerwise, BEGIN))),
    ):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(reload, "check_reload", Server.check_reload)
    monkeypatch.setattr(reload, "check_files", lambda *_: None)  # there are none
    monkeypatch.setattr(reload, "proofs_of", Server.proofs_of)
    monkeypatch.setattr(get_current_vllm_config(), "model_config", HERE)
    monkeypatch.setattr(Server, "refuses", False)
    plugin.watch_models()
    watch_reloads()


class Sleeper:
    """A worker as vLLM has them on GPUs, where level 2 drops what parameters hold."""

    def __init__(self, model):
        self.model, self.model_config = model, SimpleNamespace(sleep_preserve_parameter_names=None)

    def get_model(self):
        return self.model

    def sleep(self, level=1):
        for parameter in self.model.parameters() if level == 2 else ():
            if parameter.numel():
                parameter.data.view(torch.uint8).random_(generator=torch.Generator().manual_seed(9))

    def reload_weights(self, server, weights_path, is_checkpoint_format=True):
        self.model_config.model = weights_path
        server.reload(2)

    def start_weight_update(self): ...

    def start_draft_weight_update(self): ...


watch_worker(Sleeper)


@dataclass
class Server:
    """A server of a checkpoint, as far as weights go."""

    refuses: ClassVar[bool] = False  # the files are not those that it was started with
    read: ClassVar[tuple]
    checkpoint: Checkpoint
    model: Model

    @classmethod
    def check_reload(cls, *_, **__):
        if cls.refuses:
            raise RiaError("not the files of the start")

    @classmethod
    def proofs_of(cls, *_):
        """Those of the files that were read last."""
        checkpoint, tensors = cls.read
        return checkpoint.schema(), checkpoint.proofs(tensors)

    @classmethod
    def started(cls, checkpoint, training, monkeypatch):
        """With the weights of a training; with dummies if it is None."""
        config = get_current_vllm_config()
        config.load_config.load_format = "dummy" if training is None else "auto"
        for kind in ("dtype", "head_dtype"):
            monkeypatch.setattr(HERE, kind, checkpoint.stored.dtype)
        config.additional_config = {"tied": checkpoint.tied, "dtype": checkpoint.stored.dtype}
        monkeypatch.setattr(config, "quant_config", checkpoint.config())
        config.quant_config.where = HERE.model
        server = cls(checkpoint, utils.initialize_model(config, model_class=Model, model_config=None))
        if training is None:
            DummyModelLoader(LoadConfig(load_format="dummy")).load_weights(server.model, HERE)
        else:
            server.model.load_weights(server.files(checkpoint.tensors(training).items()))
        utils.process_weights_after_loading(server.model, HERE, torch.device("cpu"))
        return server

    def files(self, tensors):
        """As vLLM's loader reads them."""
        Server.read = self.checkpoint, dict(tensors)
        loader = DefaultModelLoader(LoadConfig())
        loader._get_weights_iterator = lambda source: ((name, tensor.clone()) for name, tensor in tensors)
        return loader.get_all_weights(HERE, self.model)

    def load(self, *pieces):
        """As vLLM's `reload_weights` and weight transfer do it."""
        vllm_reload.initialize_layerwise_reload(self.model)
        for piece in pieces:
            self.model.load_weights(piece)
        vllm_reload.finalize_layerwise_reload(self.model, HERE)

    def reload(self, training, **changed):
        """From files."""
        tensors = {name: changed.get(name, one) for name, one in self.checkpoint.tensors(training).items()}
        self.load(self.files([(name, one) for name, one in tensors.items() if one is not None]))

    def sync(self, tensors, pieces=1, shuffled=False):
        """By a trainer."""
        tensors = [(name, tensor.clone()) for name, tensor in tensors.items()]
        if shuffled:
            random.Random(pieces).shuffle(tensors)
        self.load(*(tensors[piece::pieces] for piece in range(pieces)))

    def sleep(self):
        Sleeper(self.model).sleep(level=2)
        assert self.logits() is None

    @torch.no_grad()
    def logits(self):
        """None if the server refuses to compute."""
        try:
            x = self.model(IDS)
            return self.model.compute_logits(x).clone()
        except RiaError as error:
            assert "this server has no weights" in str(error)
            assert self.model.ria_reloads.stopped
            return None
