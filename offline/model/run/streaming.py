"""A causal LM whose weights stay in their files; parts of it are loaded, used and freed."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ria_vllm.errors import RiaError
from ria_vllm.format.sparse24 import VALUE_DTYPES
from ria_vllm.hf.experts_layout import experts_modules
from ria_vllm.offline.model.experts.files import ExpertFiles, ExpertWeights, other_experts, other_weights
from ria_vllm.offline.model.experts.run import Weights, run_one_by_one, set_weights
from ria_vllm.offline.model.files.source_tensors import SourceTensors
from ria_vllm.offline.model.run.architecture import (
    find_base,
    find_decoder,
    model_class,
    outside_decoder,
    text_config,
)
from ria_vllm.offline.model.run.buffers import compute_buffers
from ria_vllm.offline.model.run.dtypes import choose_dtype, keep_float32
from ria_vllm.offline.model.run.hf import attention_options, configured_dtype, explained
from ria_vllm.offline.model.run.loading import Loader, prefix_of
from ria_vllm.offline.model.run.names import Names


class StreamedModel:
    """The model's own modules on the meta device, and the file of each of their tensors.

    The weights of routed experts stay on the meta device in a loaded layer, too: each expert is read from the files
    when tokens reach it.

    Modules are called by their names in the model, tensors by the names that they are written under (see `Names`).
    stored_dtype is the checkpoint's, and that of what is dequantized; dtype is the one that layers are computed in, but
    for the tensors that transformers keeps in float32.

    experts: for each layer, path of experts that are streamed, relative to it -> where they are in the files.
    dense_experts: for each layer, path of experts that cannot be streamed -> why.

    Args:
        folder: a Hugging Face folder with safetensors, see `SourceTensors`.
        config: its configuration.
        dtype: the dtype to compute in; None: as chosen by `choose_dtype`.

    Raises:
        RiaError: no decoder layers with linears, or weights that do not fit the configuration.
    """

    def __init__(self, folder: Path, config: PretrainedConfig, device: torch.device, dtype: torch.dtype | None = None):
        self.folder = folder
        self.device = device
        self.config = config
        source = SourceTensors(folder, configured_dtype(config))
        self.files = source.files
        self.stored_dtype = _writable(source.dtype, folder)
        self.dtype = choose_dtype(self.stored_dtype, device) if dtype is None else dtype
        architecture = model_class(str(folder), config)
        unusable = f"{folder / 'config.json'}: transformers cannot build this model"
        with explained(unusable), torch.device("meta"):
            self.model: PreTrainedModel = architecture._from_config(
                config, dtype=self.dtype, **attention_options(config)
            )
        keep_float32(self.model, self.dtype, folder)
        self.model.eval().requires_grad_(False)
        self.decoder_path, self.layers_path = find_decoder(self.model, folder)
        self.base_path = find_base(self.model, self.decoder_path)
        self.layers: Sequence[nn.Module] = self.model.get_submodule(self.layers_path)
        self.names = Names(self.model, self.files, folder)
        self.tensors = source.renamed(self.names.files)
        self._expert_weights = ExpertWeights(self.layers, self.layers_path, self._width, self.names, self.tensors)
        self.experts: Sequence[Mapping[str, ExpertFiles]] = self._expert_weights.experts
        self.dense_experts: Sequence[Mapping[str, str]] = self._expert_weights.dense
        streamed = self._expert_weights.parameters
        self.loader = Loader(self.model, self.names, self.tensors, self.decoder_path, streamed, device, self.dtype)
        for index, layer in enumerate(self.layers):
            run_one_by_one(layer)
            self._reset_experts(index)
        self.loader.check_all()
        self.loader.check_tied()
        self._materialize_buffers()

    @property
    def _width(self) -> int:
        """Of the residual stream."""
        return self.model.get_submodule(self.base_path).get_input_embeddings().weight.shape[1]

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model knows."""
        return self.model.get_submodule(self.base_path).get_input_embeddings().num_embeddings

    @property
    def is_wrapper(self) -> bool:
        """Whether the model reads more than text, with other modules than its text decoder."""
        return text_config(self.model.config) is not self.model.config

    @property
    def linear_weights(self) -> int:
        """The number of weights in the linears of all decoder layers, those of experts included."""
        found = 0
        for layer in self.layers:
            found += sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear))
            found += sum(layout.weights for layout in experts_modules(layer).values())
            others = (layer.get_submodule(path) for path in other_experts(layer, self._width))
            found += sum(weight.numel() for module in others for weight in other_weights(module, self._width))
        return found

    def layer_prefix(self, index: int) -> str:
        return f"{self.layers_path}.{index}."

    def names_in_layer(self, index: int) -> list[str]:
        """The written names of a layer's tensors."""
        prefix = self.layer_prefix(index)
        return [written for written, name in self.names.inside.items() if name.startswith(prefix)]

    def names_outside_layers(self) -> list[str]:
        """All other written names, including those of layers that the model does not have."""
        layers = {name for index in range(len(self.layers)) for name in self.names_in_layer(index)}
        return [written for written in self.names.files if written not in layers]

    def written_linear(self, index: int, name: str) -> str:
        """The written name of a linear of layer `index`; `name` is relative to the layer."""
        return self.names.linear(self.layer_prefix(index) + name)

    def unknown_linears(self) -> list[str]:
        """The written names of possible linears that the model does not have, without single experts."""
        names = [name for name in self.names.unknown if name.endswith(".weight") and ".experts." not in name]
        return [written.removesuffix(".weight") for written in names if len(self.tensors.shape(written)) == 2]

    def read(self, name: str) -> torch.Tensor:
        """The tensor with this written name, on the CPU: as it is in the file, or dequantized."""
        return self.tensors.read(name)

    def from_files(self, index: int, path: str) -> Weights:
        """The weights of the experts at `path` in layer `index`, as in the files, on the device."""

        def weights(expert: int) -> dict[str, torch.Tensor]:
            found = self._expert_weights.read(index, path, expert)
            return {kind: weight.to(self.device, self.dtype) for kind, weight in found.items()}

        return weights

    def load_layer(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights, on the device; without those of experts in `experts`."""
        self.loader.load(self.layers[index], self.layer_prefix(index))
        self._reset_experts(index)
        return self.layers[index]

    def _reset_experts(self, index: int) -> None:
        """Let the experts of a layer be run with the weights in the files."""
        for path in self.experts[index]:
            set_weights(self.layers[index].get_submodule(path), self.from_files(index, path))

    def check_layer(self, index: int) -> None:
        """Refuse what is wrong with a layer that is copied without being run.

        Raises:
            RiaError: values that are not finite, another shape than config.json asks for, a quantized model's dtype.
        """
        self.load_layer(index)
        self.free_layer(index)
        for path, files in self.experts[index].items():
            for expert in range(files.layout.num_experts):
                self._expert_weights.read(index, path, expert)

    def free_layer(self, index: int) -> None:
        """Move a layer back to the meta device."""
        for module in self.layers[index].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def load_base(self) -> nn.Module:
        """The model without its head; the text decoder's weights outside its layers are on the device.

        A module outside the text decoder gets its weights when it is called, which a vision tower never is for text.
        """
        base, path = self.model.get_submodule(self.base_path), self.decoder_path
        self.loader.load(self.model.get_submodule(path), prefix_of(path), without=f"{self.layers_path}.")
        first = prefix_of(self.base_path) + next(name for name, _ in base.named_parameters())
        if self.model.get_parameter(first).is_meta:
            self.loader.load_direct({first: first})  # wrappers take its device and dtype for their own
        self._on_call = [
            module.register_forward_pre_hook(partial(self._load_called, name))
            for name, module in outside_decoder(self.model, path)
            if module._parameters or module._buffers
        ]
        return base

    def _load_called(self, name: str, module: nn.Module, _: Any) -> None:
        if any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()]):
            self.loader.load(module, prefix_of(name))
            self._materialize_buffers(inside=name)

    def free_base(self) -> None:
        for hook in self._on_call:
            hook.remove()
        layers = f"{self.layers_path}."
        for name, parameter in list(self.model.named_parameters()):
            if not name.startswith(layers):
                self.loader.set(name, parameter.to("meta"))

    def _materialize_buffers(self, inside: str | None = None) -> None:
        """Let the model compute the buffers that no file holds.

        Args:
            inside: of the module with this name; None: of all that do not lie outside the text decoder.

        Raises:
            RiaError: see `compute_buffers`.
        """
        outside = {name for name, _ in outside_decoder(self.model, self.decoder_path)}
        names = []
        for name, _ in self.model.named_non_persistent_buffers():
            owner = name.rpartition(".")[0]
            if owner not in outside if inside is None else f"{owner}.".startswith(f"{inside}."):
                names.append(name)
        compute_buffers(self.model, names, self.device, inside is None, self.folder)


def stored_dtype(folder: Path, config: PretrainedConfig) -> torch.dtype:
    """The dtype that config.json names; if it names none, that of the largest tensor that is not quantized.

    Raises:
        RiaError: a dtype in which no checkpoint is written.
    """
    dtype = configured_dtype(config)
    return _writable(SourceTensors(folder, None).dtype if dtype is None else dtype, folder)


def _writable(dtype: torch.dtype, folder: Path) -> torch.dtype:
    if dtype not in VALUE_DTYPES:
        raise RiaError(f"{folder}: dtype {dtype}; compress needs bfloat16, float16 or float32 weights.")
    return dtype
