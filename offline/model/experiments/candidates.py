"""The folds that a layer could have, by the shapes of its linears; `folds` tries them."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

from ria_vllm.format.layer_schema import Fold, Producer

# What modules and configurations call the number of query heads, and the width of one.
NUM_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_q_heads")
HEAD_WIDTH = ("head_dim", "v_head_dim", "global_head_dim", "head_size", "head_width")


def candidates(
    consumer: str, width: int, producers: Sequence[tuple[str, int]], groups: Iterable[set[str]], heads: Sequence[int]
) -> Iterator[Fold]:
    """Folds of one consumer, those that leave the permutation most freedom first.

    Args:
        consumer: its name.
        width: its in-features.
        producers: (name, out-features) of the linears that ran before it, the last one first.
        groups: sets of linears that read the same tensor.
        heads: possible numbers of query heads, the smallest first.
    """
    exact = [name for name, rows in producers if rows == width]
    for name in exact:
        yield _elementwise(consumer, Producer(name=name))
    for group in groups:
        for pair in combinations([name for name in reversed(exact) if name in group], 2):
            yield _elementwise(consumer, *(Producer(name=name) for name in pair))
    for name, rows in producers:
        if rows == 2 * width:
            yield _elementwise(consumer, *(Producer(name=name, rows=span) for span in ((0, width), (width, rows))))
            yield _elementwise(consumer, *(Producer(name=name, rows=(i, i + 1), blocks=width) for i in (0, 1)))
    for num_heads in heads:
        values = [found for name, rows in producers for found in _values(name, rows, width, num_heads)]
        for value, num_kv_heads in values:
            yield _attention(consumer, num_heads, num_kv_heads, value)
        gates = [found for name, rows in producers for found in _gates(name, rows, width, num_heads)]
        for value, num_kv_heads in values:
            for gate in gates:
                if gate.name != value.name:
                    yield _attention(consumer, num_heads, num_kv_heads, value, gate)


def head_counts(width: int, *described: Any) -> list[int]:
    """The numbers of heads that `width` channels may make, by what modules and configurations say; ascending."""
    found = set()
    for one in described:
        counts = [_number(one, name) for name in NUM_HEADS]
        counts += [width // size for name in HEAD_WIDTH if (size := _number(one, name)) and width % size == 0]
        found |= {count for count in counts if count is not None and 1 < count < width and width % count == 0}
    return sorted(found)


def _number(described: Any, name: str) -> int | None:
    try:
        value = getattr(described, name, None)
    except Exception:  # Gemma 4's configuration refuses to tell what differs between layers
        return None
    return value if isinstance(value, int) and value > 0 else None


def _elementwise(consumer: str, *producers: Producer) -> Fold:
    return Fold(consumer=consumer, producers=list(producers), coupling="elementwise")


def _attention(consumer: str, num_heads: int, num_kv_heads: int, *producers: Producer) -> Fold:
    return Fold(
        consumer=consumer,
        producers=list(producers),
        coupling="heads",
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
    )


def _values(name: str, rows: int, width: int, num_heads: int) -> Iterator[tuple[Producer, int]]:
    """The rows of a linear that may be the values of an attention whose output has `width` channels, and the number of
    its key-value heads."""
    head_dim = width // num_heads
    block, rest = divmod(rows, num_heads)
    if not rest and block > head_dim:  # each head's values behind its keys, which may have another width
        yield Producer(name=name, rows=(block - head_dim, block), blocks=num_heads), num_heads
    if rows % head_dim:
        return
    heads = rows // head_dim
    if num_heads % heads == 0:
        yield Producer(name=name), heads
    num_kv_heads, rest = divmod(heads - num_heads, 2)  # queries, keys and values in one linear
    if num_kv_heads < 1 or rest or num_heads % num_kv_heads:
        return
    yield Producer(name=name, rows=(rows - num_kv_heads * head_dim, rows)), num_kv_heads
    block = rows // num_kv_heads  # each key-value head with the queries that read it
    if 1 < num_kv_heads < num_heads:
        yield Producer(name=name, rows=(block - head_dim, block), blocks=num_kv_heads), num_kv_heads


def _gates(name: str, rows: int, width: int, num_heads: int) -> Iterator[Producer]:
    """The rows of a linear that may be a gate on the output of attention."""
    if rows == width:
        yield Producer(name=name, rows=(0, width))
    if rows == 2 * width:  # with the queries, head by head or behind them
        block = rows // num_heads
        yield Producer(name=name, rows=(block // 2, block), blocks=num_heads)
        yield Producer(name=name, rows=(width, rows))
