"""Smaller configurations whose decoder layer is like the real one in everything but its widths.

No list says which fields of a configuration are widths. A layer is built on the meta device, which takes milliseconds,
with one integer of the configuration changed. If then the same modules have other shapes, the integer is a width.
Widths are divided, one or some together, as long as the layer stays alike (`likeness`):

- the same modules with the same switches, and parameters of the same names;
- two dimensions, of any two parameters, are equal exactly if they are in the real layer;
- a linear returns twice as many channels as another one reads exactly if it does in the real layer;
- numbers that modules have, such as the number of heads that share keys and values, are more than one exactly if they
  are in the real layer.

Code that computes the layer then takes the same branches, unless it compares a width with a number of its own.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ria_vllm.offline.model.candidates import HEAD_WIDTH, head_counts
from ria_vllm.offline.model.experiment import weights_of_copy
from ria_vllm.offline.model.topology import LAYER_NUMBER

# A layer with so few weights is not made smaller.
ENOUGH = 1 << 19
# So many widths are divided together at most.
TOGETHER = 3
HEADS = "numbers of heads"

# A field of a configuration, or of one within it: its name, and the names of those around it.
Field = tuple[str, ...]


def smaller_configs(config: PretrainedConfig, layer: nn.Module, index: int, enough: int = ENOUGH) -> Iterator[Any]:
    """Configurations of a model whose layer `index` is like `layer`, but smaller.

    After the first, one keeps the width of heads, and each other one keeps one width that the first has changed: some
    fields have to fit others that are no widths, such as the sections of a rotary embedding, which only shows when the
    layer runs.

    Args:
        config: of the text model. It is left as it is.
        layer: on the meta device, or any other.
        enough: a layer with this many weights in its copy is not made smaller.
    """
    tried: list[dict[Field, int]] = [{}]
    for changes in _Search(config, layer, index, enough).variants():
        if changes not in tried:
            tried.append(changes)
            yield changed(config, changes)


def changed(config: PretrainedConfig, changes: Mapping[Field, int]) -> PretrainedConfig:
    """A configuration made anew, so that what it derives from its fields follows the changes."""
    values = config.to_dict()
    for field, value in changes.items():
        *outer, name = field
        place = values
        for key in outer:
            place = place[key]
        place[name] = value
    made = type(config).from_dict(values)
    for name in ("_attn_implementation", "_experts_implementation"):
        if getattr(config, name, None) is not None:
            setattr(made, name, getattr(config, name))
    return made


def likeness(layer: nn.Module) -> tuple:
    """What a layer and a smaller copy of it must have in common. See the module's docstring."""
    modules = tuple((name, type(module), _switches(module)) for name, module in layer.named_modules())
    # Buffers follow from parameters, and some only exist once the whole model has computed them.
    tensors = list(layer.named_parameters())
    first: dict[int, int] = {}
    same = [(size <= 1, first.setdefault(size, len(first))) for _, tensor in tensors for size in tensor.shape]
    names = tuple((name, tensor.dim()) for name, tensor in tensors)
    return modules, names, tuple(same), tuple(_twice_as_wide(layer))


def _twice_as_wide(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """Which linears return twice what which others read: a gate and what it is multiplied with, perhaps."""
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    for (name, one), (reader, other) in itertools.permutations(linears.items(), 2):
        if one.out_features == 2 * other.in_features:
            yield name, reader


def _switches(module: nn.Module) -> frozenset[tuple[str, str]]:
    """What a module does or does not do; of numbers, whether they are more than one."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    switches = {(name, repr(value)) for name, value in own.items() if isinstance(value, (bool, str))}
    return frozenset(switches | {(name, repr(min(value, 2))) for name, value in _own_numbers(module)})


class _Search:
    def __init__(self, config: PretrainedConfig, layer: nn.Module, index: int, enough: int):
        self.config, self.layer, self.index, self.enough = config, layer, index, enough
        self.wanted = likeness(layer)
        self.real = _numbers(layer, config)
        self.values = dict(_integers(config.to_dict()))
        self.heads_stay_wide = False
        # What only says the width of heads once more, for parts of the model outside of this layer.
        self.echoes: list[Field] = []
        self._widths: list[Field] | None = None

    def variants(self) -> Iterator[dict[Field, int]]:
        """The changes of `smaller_configs`, in its order; some may be equal, or empty."""
        if weights_of_copy(self.layer) <= self.enough:
            return  # without a search for the widths, which takes longer than to describe a small layer
        first = self.smallest(self.widths())
        yield first
        if not first:
            return
        self.heads_stay_wide = True
        yield self.smallest(self.widths())
        self.heads_stay_wide = False
        for kept in first:
            yield self.smallest([field for field in self.widths() if field != kept])

    def widths(self) -> list[Field]:
        """The fields that change widths or numbers of heads, and not the modules.

        There are none if the layer cannot be built by itself.
        """
        if self._widths is None:
            built = self._built({})
            possible = built is not None and self._is_alike(built[0]) and _numbers(*built) == self.real
            self._widths = self._find_widths() if possible else []
        return self._widths

    def _find_widths(self) -> list[Field]:
        found, refused = [], []
        for field in self.values:
            moved = [self._moved({field: other}) for other in self._others(field)]
            if any(moved):
                found.append(field)
            elif all(one is None for one in moved):
                refused.append(field)
            elif field[-1] in HEAD_WIDTH:
                self.echoes.append(field)
        # Some can only be changed together, such as the width of a mixer and the number of its heads.
        for field in refused:
            for partner in (*found, *refused):
                if field != partner and self._moved({field: 2 * self.values[field], partner: 2 * self.values[partner]}):
                    found.append(field)
                    break
        return [field for field in self.values if field in found]

    def _others(self, field: Field) -> tuple[int, int]:
        return 2 * self.values[field], self.values[field] // 2

    def _moved(self, changes: Mapping[Field, int]) -> bool | None:
        """Whether these changes are of widths; None if the layer cannot be built with them."""
        built = self._built(changes)
        if built is None:
            return None
        numbers = _numbers(*built)
        moved = {key for key in self.real if numbers.get(key) != self.real[key]}
        heads = {key for key in moved if HEADS in key}
        own = {key for key in moved - heads if isinstance(key[-1], str)}
        return bool(moved - heads - own) or bool(heads and own)

    def smallest(self, widths: Iterable[Field]) -> dict[Field, int]:
        """New values for some of `widths`. Those that change nothing any more are left out."""
        widths, values = list(widths), dict(self.values)
        weights = weights_of_copy(self.layer)
        progress = True
        while progress and weights > self.enough:
            progress = False
            for fields in self._tries(widths, values):
                smaller = self._divided(values, fields)
                if smaller is not None:
                    values, weights = smaller
                    progress = True
                    break
        return self._changes(values)

    def _changes(self, values: Mapping[Field, int]) -> dict[Field, int]:
        changes = {field: value for field, value in values.items() if value != self.values[field]}
        for echo in self.echoes:
            like = [value for field, value in changes.items() if self.values[field] == self.values[echo]]
            if like and echo not in changes:
                changes[echo] = like[-1]
        return changes

    def _tries(self, widths: Sequence[Field], values: dict[Field, int]) -> Iterator[tuple[Field, ...]]:
        """Fields to divide together: single ones, all but a few, and few."""
        possible = [field for field in widths if self._can_be(values, [field], 2)]
        yield from ((field,) for field in possible)
        for count in range(TOGETHER + 1):
            for left_out in itertools.combinations(possible, count):
                rest = tuple(field for field in possible if field not in left_out)
                if len(rest) > TOGETHER:
                    yield rest
        for count in range(2, TOGETHER + 1):
            yield from itertools.combinations(possible, count)

    def _divided(self, values: dict[Field, int], fields: tuple[Field, ...]) -> tuple[dict[Field, int], int] | None:
        """The values with these fields divided by the same power of two, the largest that leaves the layer alike."""
        divisors = [1 << power for power in range(1, 20) if self._can_be(values, fields, 1 << power)]
        # Several fields belong together if any division is possible, and nearly always the smallest then is.
        if len(fields) > 1 and divisors and self._weights(_quotients(values, fields, 2)) is None:
            return None
        for divisor in reversed(divisors):
            smaller = _quotients(values, fields, divisor)
            weights = self._weights(smaller)
            if weights is not None:
                return smaller, weights
        return None

    def _can_be(self, values: dict[Field, int], fields: Iterable[Field], divisor: int) -> bool:
        return all(
            values[field] % divisor == 0 and values[field] // divisor >= _least(self.values[field]) for field in fields
        )

    def _weights(self, values: dict[Field, int]) -> int | None:
        """The weights of the layer's copy; None if the layer is not like the real one."""
        changes = self._changes(values)
        built = self._built(changes)
        if built is None:
            return None
        numbers = _numbers(*built)
        if any(numbers.get(key, 0) < _least(old) for key, old in self.real.items() if HEADS not in key):
            return None
        if self.heads_stay_wide and any(
            numbers.get(key) != self.real[key] for key in self.real if key[-1] in HEAD_WIDTH
        ):
            return None
        return weights_of_copy(built[0]) if self._is_alike(built[0]) else None

    def _built(self, changes: Mapping[Field, int]) -> tuple[nn.Module, Any] | None:
        """The layer with these changes, and its configuration; None if either refuses them, in whatever way."""
        with suppress(Exception):
            config = changed(self.config, changes)
            for rest in ((self.index,), ()):
                with suppress(Exception), torch.device("meta"):
                    return type(self.layer)(config, *rest), config
        return None

    def _is_alike(self, made: nn.Module) -> bool:
        modules, *others = likeness(made)
        real, *wanted = self.wanted
        # The real layer may have been told more since it was built.
        same = len(modules) == len(real) and all(
            one[:2] == other[:2] and one[2] <= other[2] for one, other in zip(modules, real, strict=True)
        )
        return same and others == wanted


def _least(value: int) -> int:
    """What a width of `value` may become: wide enough for a permutation of it to be a random one."""
    return 16 if value >= 64 else 8 if value >= 16 else min(value, 2)


def _quotients(values: dict[Field, int], fields: Iterable[Field], divisor: int) -> dict[Field, int]:
    smaller = copy(values)
    for field in fields:
        smaller[field] //= divisor
    return smaller


def _numbers(layer: nn.Module, config: Any) -> dict[tuple, int]:
    """The dimensions of a layer's parameters, the numbers of its heads, and the other numbers that its modules have."""
    found: dict[tuple, int] = {}
    for name, tensor in layer.named_parameters():
        found |= {(name, dim): size for dim, size in enumerate(tensor.shape)}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            around = layer.get_submodule(name.rpartition(".")[0])
            found |= {(name, HEADS, str(i)): n for i, n in enumerate(head_counts(module.in_features, around, config))}
        found |= {(name, key): value for key, value in _own_numbers(module)}
    return found


def _own_numbers(module: nn.Module) -> Iterator[tuple[str, int]]:
    for name, value in vars(module).items():
        if isinstance(value, int) and not isinstance(value, bool) and not name.startswith("_"):
            if not any(part in name for part in LAYER_NUMBER):
                yield name, value


def _integers(values: Mapping[str, Any], outer: Field = ()) -> Iterator[tuple[Field, int]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _integers(value, (*outer, name))
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
            yield (*outer, name), value
