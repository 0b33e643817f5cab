"""What must hold for every model type of the zoo."""

import re
from typing import Any

from zoo.toy import Toy

SHARE = 0.95
# What reads the residual stream has no producers to fold into. It shares one gather with all that reads it.
READS_STREAM = re.compile(
    r"([qkvabg]_proj|qkv_proj|Wqkv|c_attn|query_key_value|q_a_proj|kv_a_proj_with_mqa|[fg]_a_proj|in_proj(_\w+)?|"
    r"gate_proj|up_proj|gate_up_proj|input_linear|w1|w3|fc1|fc_in|c_fc|dense_h_to_4h|linear_left|per_layer_input_gate)"
)
CONVOLUTION = "a convolution before it has weights for each channel"
NORM = "a norm before it has a weight for each channel"
# Consumers that gather in every model type that has them -> why.
GATHERS = {
    "mamba.out_proj": CONVOLUTION,
    "mixer.out_proj": CONVOLUTION,
    "conv.out_proj": CONVOLUTION,
    "linear_attn.out_proj": CONVOLUTION,
    "linear_attn.o_proj": CONVOLUTION,
    "self_attn.q_b_proj": NORM,
    "self_attn.kv_b_proj": NORM,
    "per_layer_projection": "its input is multiplied by a layer's own part of the embedding",
}
# The largest median and maximum of |difference| of log probabilities, and the smallest share of tokens chosen alike.
# In bfloat16, each activation is rounded to 8 bits.
LIMITS = {"float32": (1e-3, 1e-2, 0.95), "bfloat16": (0.05, 0.5, 0.7)}
# The same between vLLM on the pruned folder and on the exported one. Both round alike: most log probabilities are equal
# bit by bit. Products are summed in another order, which now and then rounds an activation to its neighbour.
IN_VLLM = (1e-3, 0.05, 0.5)
# Dense models differ by less in float32, unless something computes in another way: `Toy.differs` says what.
ALIKE = 1e-4
# The pruned model may be so many times as far from transformers as the dense one, plus so much: median and maximum.
FURTHER, MARGIN = 4, (5e-6, 2e-5)


def disagreement(found: dict[str, Any], dtype: str) -> str:
    """Why vLLM and transformers do not agree; "" if they do.

    Args:
        found: what `agreement` returns, or {"error": text}.
    """
    return _beyond(found, LIMITS[dtype])


def is_loose(toy: Toy) -> bool:
    """Whether rounding hides small errors in the comparison with transformers, which computes in float32."""
    return toy.dtype != "float32"


def _beyond(found: dict[str, Any], limits: tuple[float, float, float]) -> str:
    if "error" in found:
        return found["error"]
    median, largest, same = limits
    for kind, numbers in found.items():
        near = numbers["median"] < median and numbers["largest"] < largest and numbers["same"] >= same
        if not near:  # NaN is not near either
            return f"{kind}: {numbers}"
    return ""


def further_than_dense(served: dict[str, Any], dense: dict[str, Any]) -> str:
    """Where the pruned model is further from transformers than rounding alone makes the dense one; "" if nowhere."""
    for kind in served:
        if kind not in dense:
            return f"{kind}: the dense toy was not asked"
        for what, margin in zip(("median", "largest"), MARGIN):
            found, limit = served[kind][what], FURTHER * dense[kind][what] + margin
            if not found <= limit:
                return f"{kind}: its {what} is {found:.1e}, the dense toy's {dense[kind][what]:.1e}"
    return ""


def difference_problems(toy: Toy, dense: dict[str, Any]) -> list[str]:
    """A difference on the dense toy that nothing explains, or an explanation that nothing needs."""
    if not dense or "error" in dense:
        return []
    largest = max(numbers["largest"] for numbers in dense.values())
    if largest > ALIKE and not toy.differs:
        return [f"the dense toy differs by {largest:.1e}: why?"]
    return ["the dense toy differs no longer"] if toy.differs and largest <= ALIKE else []


def gather_problems(toy: Toy, gathered: list[str]) -> list[str]:
    """The consumers that gather their input for no reason that is known, and the reasons that nothing needs."""
    ends = consumers_that_gather(toy, gathered)
    wrong = [f"{name} gathers its input: why?" for name, end in ends.items() if end is None]
    return wrong + [f"{end} gathers no longer" for end in toy.gathers if end not in ends.values()]


def consumers_that_gather(toy: Toy, gathered: list[str]) -> dict[str, str | None]:
    """The linears that gather their input but do not read the residual stream -> their keys in `reasons`, if any."""
    consumers = [name for name in gathered if not READS_STREAM.fullmatch(name, name.rfind(".") + 1)]
    return {name: next((end for end in reasons(toy) if f".{name}".endswith(f".{end}")), None) for name in consumers}


def reasons(toy: Toy) -> dict[str, str]:
    """End of the names of consumers that gather in this type -> why."""
    return toy.gathers | {end: reason for end, reason in GATHERS.items() if end not in toy.gathers}


def problems(toy: Toy, record: dict[str, Any]) -> list[str]:
    """Everything in a type's record that is not as promised."""
    wrong = [f"{step}: {record[step]['error']}" for step in ("build", "compress") if "error" in record.get(step, {})]
    if wrong:
        return wrong
    pruned = record["compress"]
    if pruned["share"] < SHARE:
        wrong.append(f"only {pruned['share']:.1%} of the decoder is pruned, without {pruned['dense']}")
    if not pruned["folded"] and not toy.no_fold:
        wrong.append("no fold was found")
    wrong += gather_problems(toy, pruned["gathered"])
    if not toy.not_served:
        for step, what in (("dense", "vLLM and transformers differ on the dense toy"), ("served", "served is wrong")):
            reason = disagreement(record.get(step, {"error": "not run"}), toy.dtype)
            if not reason and step == "served":
                reason = further_than_dense(record["served"], record.get("dense", {}))
            wrong += [f"{what}: {reason}"] if reason else []
        reason = _beyond(record.get("exported", {"error": "not run"}), IN_VLLM) if is_loose(toy) else ""
        wrong += [f"vLLM differs between the pruned folder and the exported one: {reason}"] if reason else []
        wrong += difference_problems(toy, record.get("dense", {}))
    return wrong
