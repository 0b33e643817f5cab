"""What a compression should do: every option that affects the result, checked and written into the checkpoint."""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError

from ria_vllm import __version__
from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json
from ria_vllm.format import formats
from ria_vllm.format.pattern import PATTERNS, SCHEMES, TWO_OF_FOUR, Pattern
from ria_vllm.format.weight_format import WeightFormat
from ria_vllm.hub.model_card import ANOTHER_PROGRAM
from ria_vllm.offline.pruning.admm import DAMPING
from ria_vllm.offline.publish import published
from ria_vllm.offline.self_written import check_fraction, held_out_of, written_of

if TYPE_CHECKING:  # type checkers know what these have in common
    from dataclasses import dataclass
else:
    from pydantic.dataclasses import dataclass

# How kept weights are updated -> the tokens on which each sublayer is then trained, see `train.train_sublayer`.
RECONSTRUCTIONS = {"none": 0, "admm": 0, "short": 48 * 2048, "block": 128 * 2048}
# The least share of them that a sublayer with fewer weights gets in a short training. Measured on SmolLM2, whose
# attention has a third of the MLP's weights: docs/lab/quality.md.
LEAST_SHARE = 1 / 3
# And the least of the learning rate that it gets: its few steps go less far. Measured there, too.
LEAST_RATE = 1 / 2
# ADMM's damping of linears that are then trained, times the calibration tokens; and the most it may be. Measured on
# SmolLM2: docs/lab/quality.md.
DAMPED_TOKENS = 16384
MOST_DAMPING = 2.0
SMOOTH = 0.5
BUDGETS = {"max_loss": "--max-loss", "min_speed": "--min-speed"}


@dataclass(frozen=True)
class Recipe:
    """The options; `ria-vllm compress --help` explains each.

    group_size: stored columns of a row that share a scale, "row", or None for the default: of int8 a row; of int4 what
        `fitting` makes of it.
    smooth: SmoothQuant's migration strength, 0 for none of it, or None for the default: see `migration_strength`.
    rotate: "heads", "none", or None for the default: see `rotates_heads`.
    prune_rest: of a model of which some linears have the pattern already, the others are pruned, and do not stay dense.
    only_keeps: all that is pruned has the pattern already; see `keeping`.
    max_loss, min_speed: a budget, one or the other; see `ria_vllm.offline.run.budget`.
    eval_text: a .txt file that the held-out samples are drawn from; None: from the calibration text.

    Raises:
        pydantic.ValidationError: a value that an option cannot have.
        RiaError: options that do not go together.
    """

    method: Literal["ria", "wanda", "magnitude"] = "ria"
    permute: Literal["lsa", "none"] = "lsa"
    calibration: str = "self"
    self_written: float = 0.0
    eval_text: str | None = None
    samples: Annotated[int, Field(ge=1)] = 32
    seq_len: Annotated[int, Field(ge=2)] = 512
    seed: int = 0
    ignore: tuple[str, ...] = ()
    reconstruct: Literal["none", "admm", "short", "block"] = "short"
    weights: Literal["float", "int8", "int4", "fp8"] = "float"
    group_size: Literal[32, 64, 128, "row"] | None = None
    activations: Literal["none", "int8", "fp8"] = "none"
    smooth: Annotated[float, Field(ge=0, le=1)] | None = None
    rotate: Literal["none", "heads"] | None = None
    compute_dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    prune_rest: bool = False
    only_keeps: bool = False
    pattern: Pattern = TWO_OF_FOUR
    max_loss: Annotated[float, Field(gt=0)] | None = None
    min_speed: Annotated[float, Field(gt=1)] | None = None

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> "Recipe":
        """The recipe for options of the command line.

        Raises:
            RiaError: an invalid one.
        """
        try:
            recipe = cls(**options)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise RiaError(f"--{name.replace('_', '-')} {options[name]!r}: {first['msg']}.") from None
        if recipe.pattern != TWO_OF_FOUR and recipe.activations == "fp8":
            raise RiaError(f"--pattern {recipe.pattern} is for CPUs, and --scheme FP8 for GPUs: give another scheme.")
        return recipe

    @classmethod
    def saved(cls, path: Path, given: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """The options of the run that wrote this report; of a text it knows the name, but not the folder.

        Args:
            given: the options that are given beside it. What followed from something else is left out, to follow from
                that, and so is what does not go together with them.

        Raises:
            RiaError: not a report of `compress`.
        """
        found = read_json(path).get("recipe")
        if not isinstance(found, dict) or not (
            str(found.get("pattern")) in PATTERNS and str(found.get("scheme")) in SCHEMES
        ):
            raise RiaError(f"--recipe {path}: not a ria_report.json of `ria-vllm compress`.")
        found |= SCHEMES[found["scheme"]]
        derived = {"only_keeps"}
        if found.get("only_keeps"):  # what follows from a model that has the pattern already
            derived |= {"method", "permute", "rotate", "reconstruct", "calibration", "self_written", "eval_text"}
        if "weights" in given:
            derived |= {"smooth", "group_size"}
        if "reconstruct" in given:
            derived |= {"rotate"} | ({"eval_text"} if given["reconstruct"] == "none" else set())
        if given.get("calibration") == "self":
            derived |= {"self_written"}
        if BUDGETS.keys() & given.keys():
            derived |= BUDGETS.keys()
        options = {field.name: found[field.name] for field in fields(cls) if field.name in found.keys() - derived}
        return options | {"pattern": PATTERNS[found["pattern"]]}

    def __post_init__(self) -> None:
        if self.group_size is not None and not self.has_integers:
            raise RiaError("--group-size: for integer weights only; give a --scheme that has them.")
        if isinstance(self.group_size, int) and self.weights == "int8" and self.activations != "none":
            raise RiaError("--group-size: W8A8 has a scale for each row; leave it out, or give --group-size row.")
        if self._words not in SCHEMES.values():
            raise RiaError(f"no --scheme has {self.weights} weights and {self.activations} activations; give one.")
        if self.max_loss is not None and self.min_speed is not None:
            raise RiaError("--max-loss and --min-speed: one follows from the other; give one of them.")
        if self.budget is not None and not self.follows_dense:
            raise RiaError(f"{self.budget}: for weights that are reconstructed; leave out --reconstruct none.")
        if self.smooth and self.activations == "none":
            raise RiaError("--smooth is for rounded inputs; give --scheme W8A8, W4A8 or FP8.")
        check_fraction(self.self_written, self.samples, self.calibration)
        if self.eval_text is not None and (not self.follows_dense or Path(self.eval_text).suffix.lower() != ".txt"):
            raise RiaError(
                "--eval-data: takes a .txt file, and weights that are reconstructed (not --reconstruct none)."
            )
        for expression in self.ignore:
            try:
                re.compile(expression)
            except re.error as error:
                raise RiaError(f"--ignore {expression!r}: not a regular expression ({error}).") from None

    @property
    def scheme(self) -> str:
        return next(name for name, scheme in SCHEMES.items() if scheme == self._words)

    @property
    def _words(self) -> dict[str, str]:
        return {"weights": self.weights, "activations": self.activations}

    @property
    def budget(self) -> str | None:
        """The option that limits what is pruned."""
        return next((option for name, option in BUDGETS.items() if getattr(self, name) is not None), None)

    @property
    def has_integers(self) -> bool:
        """Whether kept weights become integers. Linears that stay dense then do so, too."""
        return self.weights.startswith("int")

    @property
    def needs_gram(self) -> bool:
        return self.reconstruct != "none"

    @property
    def weight_format(self) -> WeightFormat:
        """The format of pruned linears. That of int4 needs a group size, see `fitting`."""
        if not self.has_integers:
            return formats.FORMATS[self.weights]
        assert self.weights != "int4" or self.group_size is not None
        return formats.INTEGERS[int(self.weights.removeprefix("int")), self._columns]

    @property
    def of_dense(self) -> "Recipe":
        """For linears that stay dense: in int8 by rows where pruned ones have integers."""
        return replace(self, weights="int8", group_size=None) if self.has_integers else self

    @property
    def _columns(self) -> int | None:
        return self.group_size if isinstance(self.group_size, int) else None

    def keeping(self) -> "Recipe":
        """For a model of which all that is pruned has the pattern already: nothing is searched or trained, weights are
        only rounded. If they are not, nothing depends on calibration tokens, so no text is read."""
        reads = self.weights != "float"
        return replace(
            self,
            only_keeps=True,
            method="ria",
            permute="none",
            rotate="none",
            reconstruct="admm" if reads and self.trains else self.reconstruct if reads else "none",
            calibration=self.calibration if reads else "self",
            self_written=self.self_written if reads else 0.0,
            eval_text=self.eval_text if reads else None,
        )

    @property
    def reads_text(self) -> bool:
        """Whether the result depends on calibration tokens."""
        return not self.only_keeps or self.weights != "float"

    @property
    def held_out(self) -> int:
        """How many samples are run besides, which say how much is lost; 0 if the dense model is not followed."""
        return held_out_of(self.samples, self.seq_len) if self.reads_text and self.follows_dense else 0

    @property
    def drawn(self) -> int:
        """How many samples there are in all."""
        return self.samples + self.held_out

    @property
    def samples_written(self) -> int:
        """How many of them the dense model writes beside a text."""
        return sum(self.written_apart)

    @property
    def written_apart(self) -> tuple[int, int]:
        """The same of those to which weights are fitted, and of the held-out ones."""
        return written_of(self.samples, self.self_written), written_of(self.held_out, self.self_written)

    @property
    def migration_strength(self) -> float:
        """How much of an input's outliers go into the weights; 0 if their scales stay where they are."""
        default = SMOOTH if self.activations != "none" and self.weights == "int8" else 0.0
        return default if self.smooth is None else self.smooth

    @property
    def rotates_heads(self) -> bool:
        """Whether the channels of heads are rotated first. By default they are where weights are trained anyway."""
        return self.trains if self.rotate is None else self.rotate == "heads"

    @property
    def follows_dense(self) -> bool:
        """Whether weights are updated towards the activations of the dense model on its own path."""
        return self.reconstruct != "none"

    @property
    def trains(self) -> bool:
        """Whether sublayers are trained."""
        return RECONSTRUCTIONS[self.reconstruct] > 0

    @property
    def before_rounding(self) -> "Recipe":
        """How linears outside of experts are pruned at first: those that are trained are rounded after that."""
        return replace(self, weights="float", group_size=None, activations="none", smooth=None) if self.trains else self

    @property
    def continues_exactly(self) -> bool:
        """Whether what comes after a trained sublayer is pruned for its weights as they were before they were rounded.

        Eight bits round so little that nothing has to make up for it; so masks and training are those of float weights.
        What int4 has changed, later layers see and correct.
        """
        return self.trains and self.weights in ("int8", "fp8")

    @property
    def damping(self) -> float:
        """ADMM's, of linears outside of experts. The fewer tokens there are, the nearer to the dense weights training
        should start, or it learns these tokens by heart."""
        fitting = min(MOST_DAMPING, DAMPED_TOKENS / (self.samples * self.seq_len))
        return max(DAMPING, fitting) if self.trains else DAMPING

    @property
    def chunk_tokens(self) -> int:
        """How many tokens are in one forward pass of a layer, and in one step of training, unless one sample has more.
        On the same tokens, twice as many steps make `block` better, but not a short training: docs/lab/quality.md.
        Where any tokens will do, a sample is enough."""
        if not self.reads_text:
            return 1
        return 1024 if self.reconstruct == "block" else 2048

    @property
    def schedule(self) -> "Schedule":
        """Of the training, if there is any."""
        in_step = max(self.chunk_tokens, self.seq_len)
        return Schedule(RECONSTRUCTIONS[self.reconstruct], in_step, is_short=self.reconstruct == "short")

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The dtype of matrix products for which bfloat16 is precise enough: in training and permutation search."""
        return torch.float32 if self.compute_dtype == "float32" else torch.bfloat16

    @property
    def of_search(self) -> dict[str, Any]:
        """Arguments of `permute.search`."""
        return {"seed": self.seed, "dtype": self.matmul_dtype, "pattern": self.pattern}

    def within(self, longest: int | None) -> "Recipe":
        """With samples that a model can read, if `longest` tokens are the most; None: any number."""
        if not longest or self.seq_len <= longest:
            return self
        if longest < 2:
            raise RiaError(f"config.json says that the model reads {longest} tokens at most; calibration needs two.")
        return replace(self, seq_len=int(longest))

    def fitting(self, widths: Mapping[str, int]) -> "Recipe":
        """The recipe with a group size that divides the in-features of the linears that may be pruned.

        Args:
            widths: linear -> in-features, a multiple of 64.

        Raises:
            RiaError: the one asked for does not.
        """
        size = self._columns
        misfits = [] if size is None else [name for name, width in widths.items() if width % size]
        if misfits:
            fitting = [str(one) for one in formats.GROUP_SIZES if _whole_groups(widths, one)]
            raise RiaError(
                f"--group-size {size}: {misfits[0]} has {widths[misfits[0]]} in-features, which do not divide into "
                f"such groups. Give --group-size {', '.join(fitting)} or row, or leave it dense with --ignore."
            )
        if self.weights != "int4" or self.group_size is not None:
            return self
        if self.activations != "none":  # scales are integers there: small groups cost bytes on the disk only
            return replace(self, group_size=32)
        # Tensor parallelism needs whole groups on each rank. Where 128 does not fit 8, 64 fits twice as many as 128.
        return replace(self, group_size=128 if _whole_groups(widths, 128, ranks=8) else 64)

    def ignores(self, name: str) -> bool:
        return any(re.search(expression, name) for expression in self.ignore)

    def dump(self, source: str) -> dict[str, Any]:
        """For config.json: enough to repeat the compression, without local paths."""
        versions = {"ria-vllm": __version__} | {name: version(name) for name in ("torch", "transformers", "scipy")}
        chosen = {"smooth": self.migration_strength, "rotate": "heads" if self.rotates_heads else "none"}
        plain: dict[str, Any] = {"pattern": str(self.pattern), "ignore": list(self.ignore), "held_out": self.held_out}
        plain["calibration"] = Path(self.calibration).name if self.reads_text else "none"
        plain["eval_text"] = None if self.eval_text is None else Path(self.eval_text).name
        if self.only_keeps:
            plain["method"] = ANOTHER_PROGRAM
        options = {"scheme": self.scheme} | {k: v for k, v in asdict(self).items() if k not in self._words}
        return options | chosen | plain | {"source": published(source), "versions": versions}


@dataclass(frozen=True)
class Schedule:
    """How long a sublayer is trained, in steps of one chunk each.

    A short training has fewer steps for sublayers with fewer weights. `share` is always a sublayer's weights divided by
    those of the layer's largest sublayer.

    tokens: that the largest sublayer is trained on.
    tokens_in_step: in one of its steps.
    is_short: of `--reconstruct short`, not of `block`.
    """

    tokens: int
    tokens_in_step: int
    is_short: bool

    def steps(self, share: float) -> int:
        """About how many there are."""
        tokens = round(self.tokens * max(share, LEAST_SHARE)) if self.is_short else self.tokens
        return tokens // self.tokens_in_step

    def chunks(self, total: int, share: float = 1.0) -> list[int]:
        """Which of `total` chunks training reads: all; or of many, for a short training, half as many as it has steps,
        evenly spread."""
        count = min(total, max(1, self.steps(share) // 2)) if self.is_short else total
        return [i * total // count for i in range(count)]

    def passes(self, chunks: int, share: float = 1.0) -> int:
        """How many passes there are over so many chunks: as many as the steps allow, but 2 to 8."""
        return min(8, max(2, self.steps(share) // chunks))

    def rate(self, share: float = 1.0) -> float:
        """The learning rate, in that of the layer's largest sublayer."""
        return max(share, LEAST_RATE) if self.is_short else 1.0


def _whole_groups(widths: Mapping[str, int], size: int, ranks: int = 1) -> bool:
    return not any(width % (size * ranks) for width in widths.values())
