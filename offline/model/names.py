"""Three names of a tensor: in its file, in transformers' model, and in the checkpoint to be written.

transformers renames tensors while it loads them (`backbone.` becomes `model.`), and makes some from several (experts
stored one by one). vLLM knows the names of the files, so those are written.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ria_vllm.checkpoint import tensor_names, weight_files
from ria_vllm.errors import RiaError
from ria_vllm.formats import WRITTEN

# Old Llama checkpoints carry it; it follows from the configuration.
LEFT_OUT = "rotary_emb.inv_freq"

# What the tensors of a pruned linear are called.
COMPRESSED = {"input_permutation"}.union(*(one.tensor_names for one in WRITTEN.values()))


class Names:
    """What the tensors of a folder are called, and what the model knows of them.

    A written name is the file's, with the base model's prefix where the file was saved without it.

    Args:
        model: its modules may be on the meta device.
        in_files: the files' names of all tensors.
        folder: where they are, for errors.

    Attributes:
        files: written name -> name in the file, sorted; all that the new checkpoint has to hold.
        inside: written name -> name in the model, or what that would be where the model has no such tensor.
        direct: name in the model -> written name, for tensors that are loaded as they are.
        converted: written names of tensors that the model's are made from.
        made: names in the model of what is made from those.
        unknown: written names of tensors that the model has no use for.

    Raises:
        RiaError: two tensors of the files go by one name, or one has a name that a checkpoint cannot have.
    """

    def __init__(self, model: PreTrainedModel, in_files: Iterable[str], folder: Path):
        # In the order in which transformers asks: some renamings depend on what they have seen before.
        in_files = sorted(in_files, key=lambda name: _natural_order(name, folder))
        known = model.state_dict()
        prefix = model.base_model_prefix
        self.mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        self.files: dict[str, str] = {}
        self.inside: dict[str, str] = {}
        self.direct: dict[str, str] = {}
        self.converted: set[str] = set()
        self.made: set[str] = set()
        self.unknown: list[str] = []
        for name in in_files:
            renamed, pattern = rename_source_key(name, renamings, converters)
            inside, _ = rename_source_key(renamed, [], [], prefix, known)
            if inside not in known and name in known:
                renamed, pattern, inside = name, None, name
            if inside not in known and name.endswith(LEFT_OUT):
                continue
            written = f"{prefix}.{name}" if inside == f"{prefix}.{renamed}" else name
            if written in self.files:
                raise _two_of(name, self.files[written], folder)
            self.files[written], self.inside[written] = name, inside
            if inside not in known:
                self.unknown.append(written)
            elif pattern is not None:
                self.converted.add(written)
                targets = next(c.target_patterns for c in converters if pattern in c.source_patterns)
                self.made |= {inside.replace(targets[0], target) for target in targets}
            elif inside in self.direct:
                raise _two_of(name, self.files[self.direct[inside]], folder)
            else:
                self.direct[inside] = written
        self.files = dict(sorted(self.files.items()))
        self.unknown.sort()
        self._written = {name: written for written, name in self.files.items()}

    def written(self, name: str) -> str | None:
        """The written name of a tensor, from its name in the file; None for what is left out."""
        return self._written.get(name)

    def linear(self, name: str) -> str:
        """The written name of a linear, from its name in the model."""
        return self.direct.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")

    def is_own(self, name: str) -> bool:
        """Whether the linear with this name in the model has a weight of its own in the files."""
        return self.direct.get(f"{name}.weight", "").endswith(".weight")


def _two_of(name: str, other: str, folder: Path) -> RiaError:
    return RiaError(
        f"{folder}: {name} and {other} are both in the files, and mean the same tensor. Get the model again, or save "
        "it with one of them."
    )


def _natural_order(name: str, folder: Path) -> list:
    if name.rpartition(".")[2] in COMPRESSED:
        raise RiaError(
            f"{folder}: {name} is in the files, a name as in a compressed model. Give the original, uncompressed one."
        )
    try:
        return dot_natural_key(name)
    except ValueError as error:
        raise RiaError(
            f"{folder}: {name[:60]!r} is in the files, and transformers cannot read such a name ({error}). Get the "
            "model again, or save it without this tensor."
        ) from None


def find_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, for all that the weight files hold, whether or not the index names it.

    Raises:
        RiaError: see `weight_files`; or two shards hold different tensors by one name.
    """
    files = weight_files(folder)
    for path in sorted(set(files.values())):
        for name in tensor_names(path):
            first = files.setdefault(name, path)
            if first != path and not _same(name, first, path):
                raise RiaError(
                    f"{path}: {name} is another tensor there than in {first.name}, and nothing says which is right. Get "
                    "the model again."
                )
    return files


def _same(name: str, *paths: Path) -> bool:
    found = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            found.append(file.get_tensor(name))
    one, other = found
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))
