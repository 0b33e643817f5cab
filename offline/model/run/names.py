"""The three names of a tensor: in its file, in transformers' model, and in the checkpoint that is written.

transformers renames tensors while it loads them (`backbone.` becomes `model.`), and merges some (experts that are
stored one by one). vLLM knows the names in the files, so those are written.
"""

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FORMATS
from ria_vllm.offline.model.files.which_weights import LEFT_OUT

# The last parts of the names of a pruned linear's tensors.
COMPRESSED = {"input_permutation"}.union(*(one.tensor_names for one in FORMATS.values()))


class Names:
    """The names of the tensors in a folder, and which tensors of the model they are.

    A written name is the one in the file, with the base model's prefix if the file was saved without it.

    Args:
        model: its modules may be on the meta device.
        in_files: the names of all tensors in the files.
        folder: where they are, for errors.

    Attributes:
        files: written name -> name in the file, sorted; everything that the new checkpoint must hold.
        inside: written name -> name in the model, or what it would be if the model had such a tensor.
        direct: name in the model -> written name, for tensors that are loaded unchanged.
        converted: written name -> the conversion by which transformers makes the model's tensors from this one, and
            which of the conversion's sources it is, counted from 0.
        made: names in the model of the tensors that are made from those.
        made_of: name in the model -> written names of the tensors that it is made from.
        unknown: written names of tensors that the model does not use.

    Raises:
        RiaError: two tensors in the files mean the same one, or one has a name that a checkpoint cannot have.
    """

    def __init__(self, model: PreTrainedModel, in_files: Iterable[str], folder: Path):
        self.folder = folder
        # In the order in which transformers renames: some renamings depend on what they have seen before.
        in_files = sorted(in_files, key=dot_natural_key)
        if reserved := next((name for name in in_files if name.rpartition(".")[2] in COMPRESSED), None):
            raise RiaError(
                f"{folder}: {reserved} is in the files, which is a name that only compressed models have. Give the "
                "original, uncompressed model."
            )
        self._known = known = model.state_dict()
        self._prefix = prefix = model.base_model_prefix
        self.mapping = get_model_conversion_mapping(model)
        self._renamings = renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        self.files: dict[str, str] = {}
        self.inside: dict[str, str] = {}
        self.direct: dict[str, str] = {}
        self.converted: dict[str, tuple[WeightConverter, int]] = {}
        self.made: set[str] = set()
        self.made_of: dict[str, list[str]] = {}
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
                converter = next(c for c in converters if pattern in c.source_patterns)
                self.converted[written] = converter, converter.source_patterns.index(pattern)
                targets = converter.target_patterns
                made = {inside.replace(targets[0], target) for target in targets}
                self.made |= made
                for one in made:
                    self.made_of.setdefault(one, []).append(written)
            elif inside in self.direct:
                raise _two_of(name, self.files[self.direct[inside]], folder)
            else:
                self.direct[inside] = written
        self.files = dict(sorted(self.files.items()))
        self.unknown.sort()

    def linear(self, name: str) -> str:
        """The written name of a linear, from its name in the model."""
        return self.direct.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")

    def is_found_compressed(self, name: str) -> bool:
        """Whether transformers finds the linear with this name in the model by any tensor of its module in the files.

        Some of its renamings match the name of the weight only, and so none of a compressed linear's tensors.
        """
        renamed, _ = rename_source_key(f"{self.linear(name)}.compressed", self._renamings, [])
        weight = renamed.removesuffix("compressed") + "weight"
        return rename_source_key(weight, [], [], self._prefix, self._known)[0] == f"{name}.weight"


def _two_of(name: str, other: str, folder: Path) -> RiaError:
    return RiaError(
        f"{folder}: {name} and {other} are both in the files, and mean the same tensor. Get the model again, or save "
        "it with only one of them."
    )
