"""What must hold for every model type of the zoo."""

from typing import Any

from zoo.toy import Toy

SHARE = 0.95
# The largest median and maximum of |difference| of log probabilities, and the smallest share of tokens chosen alike.
# In bfloat16, each activation is rounded to 8 bits.
LIMITS = {"float32": (1e-3, 1e-2, 0.95), "bfloat16": (0.05, 0.5, 0.7)}


def disagreement(found: dict[str, Any], dtype: str) -> str:
    """Why vLLM and transformers do not agree; "" if they do.

    Args:
        found: what `agreement` returns, or {"error": text}.
    """
    if "error" in found:
        return found["error"]
    median, largest, same = LIMITS[dtype]
    for kind, numbers in found.items():
        near = numbers["median"] < median and numbers["largest"] < largest and numbers["same"] >= same
        if not near:  # NaN is not near either
            return f"{kind}: {numbers}"
    return ""


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
    if not toy.not_served:
        for step, what in (("dense", "vLLM and transformers differ on the dense toy"), ("served", "served is wrong")):
            if step == "dense" and toy.unlike:
                continue
            reason = disagreement(record.get(step, {"error": "not run"}), toy.dtype)
            wrong += [f"{what}: {reason}"] if reason else []
    return wrong
