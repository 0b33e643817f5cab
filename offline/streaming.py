"""A causal LM whose weights stay in their files; single parts of it are loaded, used and let go."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ria_vllm.checkpoint import weight_files
from ria_vllm.errors import RiaError
from ria_vllm.offline import topology
from ria_vllm.offline.dtypes import choose_dtype
from ria_vllm.sparse24 import VALUE_DTYPES

# Weights whose being finite is checked at a time.
FINITE_AT_ONCE = 1 << 22


class StreamedModel:
    """The model's own modules on the meta device, and where each of their tensors lies.

    stored_dtype is the checkpoint's; dtype is what layers are computed in.

    Args:
        folder: a Hugging Face folder with safetensors.
        config: its configuration.
        dtype: to compute in; None: what `choose_dtype` chooses.

    Raises:
        RiaError: no decoder layers with linears, or weights that do not fit the configuration.
    """

    def __init__(
        self, folder: Path, config: PretrainedConfig, device: torch.device, dtype: torch.dtype | None = None
    ):
        self.folder = folder
        self.device = device
        self.config = config
        self.files = weight_files(folder)
        self.stored_dtype = stored_dtype(folder, config)
        self.dtype = choose_dtype(self.stored_dtype, device) if dtype is None else dtype
        text = config.get_text_config()
        # The fused attention kernels of torch leave out Gemma 2's soft cap.
        capped = getattr(text, "attn_logit_softcapping", None) is not None
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=self.dtype, attn_implementation="eager" if capped else None, trust_remote_code=False
            )
        self.model.eval().requires_grad_(False)
        self.layers_path = topology.decoder_layers(self.model, text.num_hidden_layers)
        self.layers: Sequence[nn.Module] = self.model.get_submodule(self.layers_path)
        self.sources = self._sources()
        self._check_outside_layers()
        self._materialize_buffers()

    def layer_prefix(self, index: int) -> str:
        return f"{self.layers_path}.{index}."

    def names_in_layer(self, index: int) -> list[str]:
        """File tensors of a layer, by the names that the checkpoint to be written gives them."""
        prefix = self.layer_prefix(index)
        return [name for name in self.sources if name.startswith(prefix)]

    def names_outside_layers(self) -> list[str]:
        prefix = f"{self.layers_path}."
        return [name for name in self.sources if not name.startswith(prefix)]

    def read(self, name: str) -> torch.Tensor:
        """One tensor as the file has it, on the CPU."""
        return next(self._read([name]))[1]

    def load_layer(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights, on the device."""
        self._load(self.layers[index], self.layer_prefix(index))
        return self.layers[index]

    def free_layer(self, index: int) -> None:
        for module in self.layers[index].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def load_base(self) -> nn.Module:
        """The model without its head, decoder layers still empty."""
        base = self._base()
        prefix = f"{self.model.base_model_prefix}." if base is not self.model else ""
        self._load(base, prefix, without=f"{self.layers_path}.")
        return base

    def _base(self) -> nn.Module:
        return getattr(self.model, self.model.base_model_prefix, self.model)

    def free_base(self) -> None:
        layers = f"{self.layers_path}."
        for name, parameter in list(self.model.named_parameters()):
            if not name.startswith(layers):
                self._set(name, parameter.to("meta"))

    def _load(self, module: nn.Module, prefix: str, without: str | None = None) -> None:
        expected = {prefix + name for name in module.state_dict()}
        expected = {name for name in expected if without is None or not name.startswith(without)}
        direct = [name for name in expected if name in self.sources and not self.converted]
        for name, tensor in self._read(sorted(direct)):
            owner = self.model.get_submodule(name.rpartition(".")[0])
            wanted = getattr(owner, name.rpartition(".")[2])
            self._check_shape(name, tensor.shape, wanted.shape)
            self._check_finite(name, tensor)
            # A copy: the file's mapping would stay in memory for as long as any tensor of it.
            self._set(name, tensor.to(self.device, wanted.dtype, copy=True))
        if self.converted:
            self._load_converted(prefix, without)
        tied = set(self.model.all_tied_weights_keys)
        missing = sorted(
            name
            for name, tensor in module.state_dict(prefix=prefix).items()
            if name in expected and tensor.is_meta and name not in tied
        )
        if missing:
            raise self._missing(missing[0])

    def _check_outside_layers(self) -> None:
        """Refuse now what would only show after the last layer, or in the finished checkpoint: the head above all.

        Presence and shapes, from the files' headers; the values of what `load_base` does not read.
        """
        layers, tied = f"{self.layers_path}.", set(self.model.all_tied_weights_keys)
        base = "" if self._base() is self.model else f"{self.model.base_model_prefix}."
        # Files that are converted while they load keep their names; those are not in `known`.
        stored = {rename_source_key(n, self.renamings, self.converters)[0] for n in self.sources if self.converted}
        for name, wanted in self.model.state_dict().items():
            if name.startswith(layers) or name in tied:
                continue
            if name not in self.sources:
                if name not in stored:
                    raise self._missing(name)
                continue
            with _opened(self.files[self.sources[name]]) as file:
                shape = file.get_slice(self.sources[name]).get_shape()
            self._check_shape(name, shape, wanted.shape)
            if not name.startswith(base):
                self._check_finite(name, self.read(name))

    def _missing(self, name: str) -> RiaError:
        return RiaError(f"{self.folder}: no weights for {name} in any file. Get the model again.")

    def _check_shape(self, name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
        if tuple(found) != tuple(wanted):
            raise RiaError(
                f"{self.files[self.sources[name]]}: {name} has shape {tuple(found)}, config.json asks for "
                f"{tuple(wanted)}. Get the model again."
            )

    def _check_finite(self, name: str, tensor: torch.Tensor) -> None:
        # In pieces: of a whole embedding the check would take as much again, and half of that.
        pieces = tensor.flatten().split(FINITE_AT_ONCE) if tensor.is_floating_point() else ()
        if not all(bool(piece.isfinite().all()) for piece in pieces):
            raise RiaError(
                f"{self.files[self.sources[name]]}: {name}: NaN or infinite values in the weights. Get the model "
                "again, or repair it."
            )

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        owner_path, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_path)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def _read(self, names: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[self.sources[name]], []).append(name)
        for path, wanted in by_file.items():
            with _opened(path) as file:
                for name in wanted:
                    yield name, file.get_tensor(self.sources[name])

    def _sources(self) -> dict[str, str]:
        """Name in the checkpoint to be written -> name in the file.

        The two differ where a file was saved without the base model's prefix. Mixture-of-experts models are stored
        with one tensor an expert and run with all experts in one; such files keep their names.
        """
        known = self.model.state_dict()
        prefix = f"{self.model.base_model_prefix}."
        mapping = get_model_conversion_mapping(self.model)
        self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.converted = False
        sources = {}
        for name in self.files:
            if name in known:
                sources[name] = name
            elif prefix + name in known:
                sources[prefix + name] = name
            elif name.endswith("rotary_emb.inv_freq"):
                continue  # old Llama checkpoints carry it; it follows from the configuration
            else:
                renamed, _ = rename_source_key(name, self.renamings, self.converters)
                self.converted |= renamed in known
                sources[name] = name
        return dict(sorted(sources.items()))

    def _load_converted(self, prefix: str, without: str | None) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        names = [name for name in self.sources if name.startswith(prefix)]
        names = [name for name in names if without is None or not name.startswith(without)]
        load = LoadStateDictConfig(
            weight_mapping=self.renamings + self.converters, dtype=self.dtype, device_map={"": self.device}
        )
        convert_and_load_state_dict_in_model(self.model, dict(self._read(names)), load)
        self.model.requires_grad_(False)

    def _materialize_buffers(self) -> None:
        """Buffers that no file holds (rotary frequencies, embedding scales), as the model computes them."""
        owners = []
        for name, buffer in self.model.named_non_persistent_buffers():
            self._set(name, torch.empty_like(buffer, device=self.device))
            owners.append(name.rpartition(".")[0])
        for owner in dict.fromkeys(owners):
            self.model._init_weights(self.model.get_submodule(owner))


def stored_dtype(folder: Path, config: PretrainedConfig) -> torch.dtype:
    """What config.json says; where it does not, the dtype of the largest tensor.

    Raises:
        RiaError: a dtype that no checkpoint is written in.
    """
    dtype = config.dtype or config.get_text_config().dtype
    if dtype is None:
        files, sizes = weight_files(folder), {}
        for name, path in files.items():
            with safe_open(path, framework="pt") as file:
                sizes[name] = math.prod(file.get_slice(name).get_shape())
        largest = max(sizes, key=sizes.__getitem__)
        with safe_open(files[largest], framework="pt") as file:
            dtype = file.get_tensor(largest).dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if dtype not in VALUE_DTYPES:
        raise RiaError(f"{folder}: dtype {dtype}; compress needs bfloat16, float16 or float32 weights.")
    return dtype


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; the RiaError of one that cannot be read has the system's error as its cause."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise RiaError(f"{path}: cannot be read ({error}). Get the file again.") from None
    except OSError as error:
        raise RiaError(
            f"{path}: cannot be read ({error}). Once it can, `compress --resume` goes on from what is finished."
        ) from error
