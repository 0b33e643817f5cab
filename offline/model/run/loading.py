"""Puts the weights of a model from its files into its modules."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.files.source_tensors import SourceTensors
from ria_vllm.offline.model.run.names import Names


class Loader:
    """Loads modules of a model.

    Args:
        model: of transformers.
        names: of the tensors in the files.
        tensors: under their written names.
        decoder_path: of the text decoder in the model.
        streamed: the parameters that are not loaded, by their names in the model.
        device, dtype: that the model is computed on and in.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: Names,
        tensors: SourceTensors,
        decoder_path: str,
        streamed: set[str],
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.model, self.names, self.tensors, self.decoder_path = model, names, tensors, decoder_path
        self.streamed, self.device, self.dtype, self.folder = streamed, device, dtype, names.folder

    def load(self, module: nn.Module, prefix: str, without: str | None = None) -> None:
        """Load a module.

        Args:
            prefix: of the names of its tensors in the model.
            without: but not tensors whose names begin with this.

        Raises:
            RiaError: a tensor is missing, of another shape or dtype than config.json asks for, or not finite.
        """
        expected = {prefix + name for name in module.state_dict()} - self.streamed
        expected = {name for name in expected if without is None or not name.startswith(without)}
        tied = self.model.all_tied_weights_keys
        # A block that several layers share is stored only once.
        shared = {name: tied[name] for name in expected & set(tied) - set(self.names.direct) if without is None}
        self.load_direct({name: shared.get(name, name) for name in expected})
        if self.names.converted:
            self._load_converted(prefix, without)
        missing = sorted(
            name
            for name, tensor in module.state_dict(prefix=prefix).items()
            if name in expected and tensor.is_meta and name not in tied
        )
        if missing:
            raise self._missing(missing[0])

    def load_direct(self, stored: Mapping[str, str]) -> None:
        """Load tensors of the model that are in the files as they are.

        Args:
            stored: name in the model -> the name, in the model, of the tensor in the files that it is.
        """
        takers: dict[str, list[str]] = {}
        for name, other in sorted(stored.items()):
            if other in self.names.direct:
                takers.setdefault(self.names.direct[other], []).append(name)
        for written, tensor in self.tensors.each(sorted(takers)):
            for name in takers[written]:
                owner = self.model.get_submodule(name.rpartition(".")[0])
                wanted = getattr(owner, name.rpartition(".")[2])
                self.tensors.check_shape(written, tensor.shape, wanted.shape)
                self.tensors.check_values(written, tensor, wanted.is_floating_point())
                self.set(name, tensor.to(self.device, wanted.dtype, copy=len(takers[written]) > 1))

    def check_all(self) -> None:
        """Refuse now what would otherwise only show after hours, or in the finished checkpoint.

        These are missing tensors and wrong shapes, from the headers of the files, and non-finite values in tensors that
        are copied without being loaded.
        """
        wanted: dict[str, torch.Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            if name in self.names.direct:
                wanted[self.names.direct[name]] = tensor
            elif name not in self.names.made and name not in self.model.all_tied_weights_keys:
                raise self._missing(name)
        for written, tensor in wanted.items():
            self.tensors.check_shape(written, self.tensors.shape(written), tensor.shape)
        for name, written in self.names.direct.items():
            if not name.startswith(prefix_of(self.decoder_path)) and name not in self.model.all_tied_weights_keys:
                self.tensors.check_values(written, self.tensors.read(written), wanted[written].is_floating_point())
        for written in sorted(self.names.converted):
            if not self.names.inside[written].startswith(prefix_of(self.decoder_path)):
                self.tensors.check_values(written, self.tensors.read(written), floating=True)
        for written in self.names.unknown:
            self.tensors.check_values(written, self.tensors.read(written), floating=False)

    def check_tied(self) -> None:
        """Tensors that config.json ties are one for vLLM, but two for transformers if the files hold two."""
        for name, other in self.model.all_tied_weights_keys.items():
            one, two = self.names.direct.get(name), self.names.direct.get(other)
            if one and two and not torch.equal(self.tensors.read(one), self.tensors.read(two)):
                raise RiaError(
                    f"{self.folder}: config.json says that {one} and {two} are one tensor, but they differ in "
                    'the files. If both are intended, put "tie_word_embeddings": false into config.json; otherwise get '
                    "the model again."
                )

    def _missing(self, name: str) -> RiaError:
        return RiaError(f"{self.folder}: no weights for {name} in any file. Get the model again.")

    def set(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor of the model into its place."""
        owner_path, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_path)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def _load_converted(self, prefix: str, without: str | None) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        names = [name for name in sorted(self.names.converted) if self.names.inside[name].startswith(prefix)]
        names = [name for name in names if self.names.inside[name] not in self.streamed]
        names = [name for name in names if without is None or not self.names.inside[name].startswith(without)]
        found = dict(self.tensors.each(names))
        if not found:
            return
        for name, tensor in found.items():
            self.tensors.check_values(name, tensor, floating=True)
        load = LoadStateDictConfig(weight_mapping=self.names.mapping, dtype=self.dtype, device_map={"": self.device})
        tensors = {self.names.files[name]: tensor for name, tensor in found.items()}
        info, _ = convert_and_load_state_dict_in_model(self.model, tensors, load)
        for name, why in sorted(info.conversion_errors.items()):
            reason = ". ".join(why.strip().splitlines()[-2:])  # `why` ends with a traceback
            raise RiaError(
                f"{self.folder}: transformers cannot make {name} from the tensors in the files ({reason}). Get the "
                "model again."
            )
        for name, made, wanted in sorted(info.mismatched_keys):
            raise RiaError(
                f"{self.folder}: {name}, made from several tensors in the files, has shape {tuple(made)}, config.json "
                f"asks for {tuple(wanted)}. Get the model again."
            )
        self.model.requires_grad_(False)


def prefix_of(path: str) -> str:
    """What the names of a module's tensors begin with, from its own name; that of the model is empty."""
    return f"{path}." if path else ""
