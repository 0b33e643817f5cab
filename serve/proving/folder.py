"""Whether this machine's kernels compute what a compressed folder says, without a server.

Each pruned linear is packed and multiplied as `ria_vllm.serve.proving.layers` has it, alone, though a server may fuse
it with others. Experts are not: their kernels compute a whole layer of them, which a server proves when it loads them.
"""

import time
from collections import Counter
from dataclasses import dataclass, field

import torch

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.sparse_linear import SparseLinear
from ria_vllm.errors import RiaError
from ria_vllm.format import proofs
from ria_vllm.format.layer_schema import numbers_in
from ria_vllm.format.schema import PROOFS_FILE, RiaSchema
from ria_vllm.format.weight_format import name_of
from ria_vllm.format.weight_scheme import Weights, WeightScheme
from ria_vllm.progress import Monitor
from ria_vllm.serve.kernels.registry import choose_and_pack


@dataclass
class Findings:
    """What came of a folder.

    Attributes:
        kernels: how linears are computed as their proofs say -> how many.
        problems: what is wrong with the others, in sentences that name them.
        experts: linears of experts, which were left out.
        dense_int8: dense ones in int8, which were, too.
        seconds: that it took.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    experts: int = 0
    dense_int8: int = 0
    seconds: float = 0.0


def served_dtype(reader: Reader) -> torch.dtype:
    """Of the activations, as vLLM chooses it: the model's own, or bfloat16 for float32."""
    if (weights := reader.schema.weights) is None:
        stored = reader.tensor(f"{reader.sparse_names[0]}.compressed").dtype
    else:
        stored = getattr(torch, weights.dtype)
    return _served(stored)


def _served(stored: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if stored == torch.float32 else stored


def prove_folder(reader: Reader, device: torch.device, dtype: torch.dtype | None, monitor: Monitor) -> Findings:
    """Multiply with each pruned linear on `device`, one in memory at a time.

    Args:
        dtype: of the activations; None: as vLLM chooses it, the model's own, or bfloat16 for float32.

    Raises:
        RiaError: the folder has no proofs, or they are damaged.
    """
    schema = reader.schema
    if schema.proofs is None:
        raise RiaError(
            f"{reader.folder}: it has no proofs ({PROOFS_FILE}). Compress the model again, or run `ria-vllm doctor` "
            "without a folder."
        )
    stored, start, found = reader.proofs(), time.perf_counter(), Findings()
    folded = {name for name, *_ in schema.active_folds(reader.permutations, set(reader.sparse_names))}
    patterns = [pattern for experts in schema.experts for pattern in experts.linears.values()]
    names = [name for name in reader.sparse_names if all(numbers_in(one, name) is None for one in patterns)]
    found.experts, found.dense_int8 = len(reader.sparse_names) - len(names), len(schema.int8_linears)
    for name in monitor.steps(names, "multiplying with pruned linears", len(names)):
        try:
            linear = reader.linear(name)
        except RiaError as error:
            found.problems.append(str(error))
            continue
        served = dtype or _served(linear.dtype)
        try:
            how, fault = _multiplied(schema, linear, name in folded, stored.get(name), served, device)
        except Exception as error:  # a kernel may raise anything on a machine that nobody has seen
            kind = "" if isinstance(error, RiaError) else f"{type(error).__name__}: "
            found.problems.append(f"{name}: {kind}{error}")
            continue
        if fault is None:
            found.kernels[how] += 1
        else:
            found.problems.append(f"{name} ({how}): {fault}")
    found.seconds = time.perf_counter() - start
    return found


def _multiplied(
    schema: RiaSchema,
    linear: SparseLinear,
    folded: bool,
    proof: torch.Tensor | None,
    served: torch.dtype,
    device: torch.device,
) -> tuple[str, str | None]:
    """How a linear is computed, and what is wrong with its products.

    Args:
        folded: its input arrives permuted; else the kernel gathers it.
        proof: float32 [out, 2].
        served: dtype of the activations.

    Raises:
        RiaError: no kernel can serve it.
        ValueError: damaged scales.
    """
    rows, columns = linear.shape
    scheme = WeightScheme.of(schema)
    weights = _weights(scheme, linear, served, device)
    choice, packed = choose_and_pack(weights, served, scheme.input_dtype)
    how = f"{choice}, {name_of(served)} activations"
    if proof is None or len(proof) != rows:
        return how, f"no proof of its {rows} rows in {PROOFS_FILE}. Get all files of one run"
    r, p = schema.proof_vector(columns), linear.input_permutation
    if p is not None and folded:
        r, p = r[p.long()], None
    if p is not None:
        p = p.to(device, torch.int32)
    for tokens in (1, proofs.TOKENS):
        x = proofs.tokens_of(r, tokens).to(device, served)
        y = choice.kernel.apply(choice.config, x, packed, p, None).cpu()
        if fault := proofs.fault(y, proof, columns, served):
            return how, fault
    return how, None


def _weights(scheme: WeightScheme, linear: SparseLinear, served: torch.dtype, device: torch.device) -> Weights:
    """What a layer of vLLM would have loaded. Whole linears need no padding.

    Raises:
        ValueError: damaged scales.
    """
    loaded = {part: linear.parts[part].to(device, spec.dtype) for part, spec in scheme.tensors(served).items()}
    scales = {tensor.dtype for part, tensor in linear.parts.items() if part == "weight_scale"}
    weights = scheme.weights(loaded, [linear.shape[0]], served, stored_scales=scales)
    assert weights is not None  # ours are stored as 2:4
    return weights
