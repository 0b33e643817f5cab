"""What `config.json` -> `quantization_config` says of a compressed checkpoint.

The folder is an ordinary Hugging Face folder in the manner of compressed-tensors' `sparse-24-bitmask`. For each pruned
linear NAME the weight files hold NAME.compressed, NAME.bitmask, NAME.shape and whatever else its format has (see
`ria_vllm.format.formats`); rows are in the model's own order, columns in the permuted one. `permutations.safetensors`
holds NAME.input_permutation where the order is not the model's own. Where the recipe permutes, that file is there even
if it is empty. `permutations_digest` here, and the same in each weight file's header, bind weights and permutations;
`weights_digest` binds weight files to each other (`DIGESTS`). `proofs` says how
`proofs/products.safetensors` was made (see `ria_vllm.format.proofs`), and binds it.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ria_vllm.errors import RiaError
from ria_vllm.format import proofs
from ria_vllm.format.formats import of_quantization
from ria_vllm.format.layer_schema import Experts, Fold, Producer, numbers_in
from ria_vllm.format.pattern import PATTERNS, Pattern
from ria_vllm.format.token_rounding import FP8_DTYPE
from ria_vllm.format.weight_format import WeightFormat

FORMAT: Final = "sparse-24-bitmask"
FORMAT_VERSION: Final = 1
QUANT_METHOD: Final = "ria"
PERMUTATIONS_FILE = "permutations.safetensors"
# Not beside the weights: vLLM loads every *.safetensors there if there is no index.
PROOFS_FILE = "proofs/products.safetensors"
REPORT_FILE = "ria_report.json"
PERMUTATION_SUFFIX = ".input_permutation"
# The recipe's entry that has what experiments found out about the layers: for programs, too long for a card or a table.
TOPOLOGY: Final = "topology"
# A digest in `quantization_config` -> its key in the `__metadata__` of each weight file.
DIGESTS = {"permutations_digest": "ria_permutations_digest", "weights_digest": "ria_weights_digest"}


class SparsityConfig(BaseModel):
    format: Literal["sparse-24-bitmask"] = FORMAT
    sparsity_structure: Literal["2:4", "4:8", "8:16"] = "2:4"
    targets: list[str] = ["Linear"]
    ignore: list[str] = []
    global_sparsity: float = 0.5

    @field_validator("ignore")
    @classmethod
    def _exact(cls, ignore: list[str]) -> list[str]:
        """A regular expression of a stranger's may run for ever, and compressing never writes one."""
        for entry in ignore:
            if entry.startswith("re:"):
                raise ValueError(f"{entry[:80]!r}: only exact names, no regular expressions")
        return ignore


class WeightQuantization(BaseModel):
    """How the values are quantized, in compressed-tensors' words; one of `ria_vllm.format.formats` has these.

    dtype: of the dense model, and so of what is exported.
    """

    # What is not understood here could change what the numbers mean.
    model_config = ConfigDict(strict=True, extra="forbid")
    num_bits: int = 8
    type: str = Field(default="int", max_length=40)
    strategy: str = Field(default="channel", max_length=40)
    symmetric: bool = True
    group_size: int | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    @model_validator(mode="after")
    def _known(self) -> "WeightQuantization":
        words = self.model_dump(exclude_none=True, exclude={"dtype"})
        if of_quantization(words) is None:
            raise ValueError(f"this version has no weight format with {words}")
        return self


class InputQuantization(BaseModel):
    """How pruned linears round their inputs, in compressed-tensors' words: each token to int8 or fp8, by its own scale.

    The permutation of a linear's input does not matter to it. `ria_vllm.format.token_rounding` has the arithmetic.
    """

    # What is not understood here could change what the model computes.
    model_config = ConfigDict(strict=True, extra="forbid")
    num_bits: Literal[8]
    type: Literal["int", "float"]
    strategy: Literal["token"]
    dynamic: Literal[True]
    symmetric: Literal[True]


INT8_TOKENS: Final = InputQuantization(num_bits=8, type="int", strategy="token", dynamic=True, symmetric=True)
FP8_TOKENS: Final = INT8_TOKENS.model_copy(update={"type": "float"})
TOKENS: Final = {torch.int8: INT8_TOKENS, FP8_DTYPE: FP8_TOKENS}


class Proofs(BaseModel):
    """The seed of the vector that all matrices were multiplied by, and the digest of what came of it."""

    model_config = ConfigDict(strict=True, extra="forbid")
    seed: int = Field(ge=0, lt=2**32)
    digest: str = Field(pattern="^[0-9a-f]{64}$")


class RiaSchema(BaseModel):
    """The whole `quantization_config`. Unknown keys are kept, so that newer minor versions stay readable.

    int8_linears: those of the dense linears that are stored in int8 (`ria_vllm.format.int8_rows`). They round their
        inputs as pruned ones do; heads in int8 do not.
    """

    model_config = ConfigDict(extra="allow")
    quant_method: Literal["ria"] = QUANT_METHOD
    format: Literal["sparse-24-bitmask"] = FORMAT
    format_version: Literal[1] = FORMAT_VERSION
    sparsity_config: SparsityConfig
    weights: WeightQuantization | None = None
    input_activations: InputQuantization | None = None
    folds: list[Fold] = Field(default=[], max_length=1000)
    experts: list[Experts] = Field(default=[], max_length=1000)
    permutations_digest: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    weights_digest: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    int8_linears: list[str] = []
    proofs: Proofs | None = None
    recipe: dict[str, Any] = {}

    @model_validator(mode="after")
    def _rounded_alike(self) -> "RiaSchema":
        if self.int8_linears and self.weights is None:
            raise ValueError("int8_linears without weights: linears are in int8 only where pruned ones have integers")
        if self.input_activations is not None and self.weights is None:
            raise ValueError("input_activations without weights: inputs are rounded for quantized weights only")
        if self.input_activations and self.weights and self.input_activations.type != self.weights.type:
            raise ValueError("input_activations have another type than weights: no kernel multiplies int with float")
        return self

    @field_validator("experts")
    @classmethod
    def _apart(cls, experts: list[Experts]) -> list[Experts]:
        modules = [entry.module for entry in experts]
        if len(set(modules)) < len(modules):
            raise ValueError("two entries have one module")
        return experts

    @property
    def permutes(self) -> bool:
        """Whether the model was compressed with permutations, even if none of them was worth storing."""
        return self.recipe.get("permute", "none") != "none"

    @property
    def unlike_dense(self) -> dict[str, Any]:
        """The options by which linears read or return scaled (`smooth`) or rotated (`rotate`) channels of the dense
        model's. Adapters that were trained on the dense model do not fit these linears as they are."""
        found = {"smooth": self.recipe.get("smooth") or 0, "rotate": self.recipe.get("rotate") or "none"}
        return {name: value for name, value in found.items() if value not in (0, "none")}

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The tensors of a pruned linear, by the last part of their names."""
        return self.weight_format.tensor_names

    @property
    def weight_format(self) -> WeightFormat:
        """What the tensors of a pruned linear mean."""
        found = of_quantization(self.weights and self.weights.model_dump(exclude_none=True, exclude={"dtype"}))
        assert found is not None  # `WeightQuantization` was checked
        return found

    @property
    def pattern(self) -> Pattern:
        """That of all pruned linears."""
        return PATTERNS[self.sparsity_config.sparsity_structure]

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The dtype to which pruned linears round each token of their inputs; None: they do not."""
        return next((dtype for dtype, words in TOKENS.items() if words == self.input_activations), None)

    @property
    def scheme(self) -> str:
        """In the words of `ria_vllm.format.pattern`; "FP8", too, if inputs are not rounded."""
        words = self.weight_format.quantization
        if words is None:
            return "BF16"
        return "FP8" if words["type"] == "float" else f"W{words['num_bits']}A{16 if self.input_dtype is None else 8}"

    def proved_transposed(self, name: str) -> bool:
        """Whether the transposed matrix `name` has a proof, too."""
        return any(numbers_in(experts.down, name) is not None for experts in self.experts)

    def proof_vector(self, size: int) -> torch.Tensor:
        """float32 [size], what proofs are products with."""
        assert self.proofs is not None
        return proofs.vector(size, self.proofs.seed, signs_only=self.input_dtype == FP8_DTYPE)

    @classmethod
    def parse(cls, config: dict[str, Any], where: str) -> "RiaSchema":
        """Validate; `where` names the file in the error."""
        try:
            return cls.model_validate(config)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part)[:80] for part in first["loc"])
            raise RiaError(
                f"{where}: quantization_config.{field}: {first['msg']}. Compress the model again, or install the "
                "ria-vllm version that wrote it."
            ) from None

    def ignored(self, name: str) -> bool:
        """Whether the linear `name` is dense."""
        return name in self.sparsity_config.ignore

    def active_folds(
        self, permuted: Iterable[str], sparse: "set[str] | frozenset[str]"
    ) -> Iterator[tuple[str, Fold, list[Producer]]]:
        """Folds that hold: the consumer is permuted and every producer is itself pruned.

        Where a producer was left dense the consumer gathers its own input instead; both stages follow this rule.
        """
        for name in permuted:
            fold = next((one for one in self.folds if one.numbers(name) is not None), None)
            producers = [] if fold is None else fold.producers_of(name)
            if fold is not None and all(producer.name in sparse for producer in producers):
                yield name, fold, producers
