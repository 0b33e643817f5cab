"""How one sublayer of a decoder layer is run by itself on a chunk of the residual stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.experiments.norms import gains_of
from ria_vllm.offline.model.experiments.split import replaced
from ria_vllm.offline.model.run.layer_call import LayerCall, Left, Reached, read_at
from ria_vllm.offline.model.topology import Sublayer

# A norm's gain, in units of the median, with which a linear makes up for half of what the stream lacks.
LEAST_GAIN = 0.3


@dataclass(frozen=True)
class SublayerRunner:
    """Runs one sublayer; streams are [samples, tokens, hidden] on the layer's device.

    layer: the decoder layer, with its weights.
    sublayer: the part of it to run.
    dtype: that the layer computes in.
    """

    layer: nn.Module
    sublayer: Sublayer
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return next(p.device for p in self.layer.parameters() if not p.is_meta)

    def linear(self, name: str) -> nn.Linear:
        """The linear with this name relative to the layer."""
        return self.layer.get_submodule(name)

    def missing_output(self, missing: torch.Tensor) -> torch.Tensor:
        """What the output of the last linear lacks, if the stream after the sublayer lacks `missing` [tokens, hidden].

        Where a norm lies between, it is what the output lacks when each token is divided by its RMS. Channels that
        hardly reach the stream would have to change a lot for it; they make up for less.
        """
        missing = missing / self.sublayer.factor
        if self.sublayer.norm is None:
            return missing
        gains = gains_of(self.layer.get_submodule(self.sublayer.norm), self.dtype).float()
        return missing * (gains / (gains.square() + (LEAST_GAIN * gains.abs().median()).square()).clamp(min=1e-12))

    def run(self, stream: torch.Tensor, call: LayerCall, left: Left | None = None) -> torch.Tensor:
        """The residual stream after the sublayer, from the one before it.

        Args:
            call: how the model calls the layer for this stream.
            left: what the sublayer leaves for later layers is added here.

        Raises:
            RiaError: the layer does not run by itself, or runs without the module that the sublayer ends before.
        """
        with replaced(self.layer, self.sublayer.stand_ins, stream):
            if self.sublayer.ends_before is None:
                return call(self.layer, stream, left)
            end = self.layer.get_submodule(self.sublayer.ends_before)
            found = read_at(end, lambda: call(self.layer, stream, left))
        if found is None:
            raise RiaError(f"a decoder layer ran without its {type(end).__name__}: not supported.")
        return found.view_as(stream)

    def watch(
        self, stream: torch.Tensor, call: LayerCall, linears: Sequence[str], to_the_end: bool = False
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Run the sublayer and look at what some of its linears read.

        Args:
            call: how the model calls the layer for this stream.
            linears: their names, relative to the layer.
            to_the_end: run the whole sublayer. Otherwise the pass stops as soon as all of them have been reached.

        Returns:
            (the stream after the sublayer, or None if the pass stopped early; linear -> its input [..., in_features]).
            A linear that was not reached is not in the mapping.
        """
        inputs: dict[str, torch.Tensor] = {}

        def watcher(name: str) -> Callable:
            def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                inputs[name] = args[0]
                if len(inputs) == len(linears) and not to_the_end:
                    raise Reached

            return hook

        hooks = [self.linear(name).register_forward_pre_hook(watcher(name)) for name in linears]
        try:
            return self.run(stream, call), inputs
        except Reached:
            return None, inputs
        finally:
            for hook in hooks:
                hook.remove()
