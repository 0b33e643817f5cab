"""Drafts of speculative decoding that read the KV cache of the model that is served.

Gemma 4's makes no keys and values of its own: it attends to those that its target keeps, and reads the result with an
`o_proj` of its own. So the target keeps values in the model's own order (`EngineOptions.shares_cache`). Where `compress
--rotate heads` has rotated them, nothing at serving time rotates them back.
"""

import re
from collections.abc import Callable

from ria_vllm.errors import RiaError
from ria_vllm.format.schema import RiaSchema
from ria_vllm.serve.load.engine import EngineOptions
from ria_vllm.serve.model.checkpoint_files import rotations_of


def check_rotated_heads(schema: RiaSchema, where: str, revision: str | None, is_pruned: Callable[[str], bool]) -> None:
    """Check that the engine's draft, if it has one that reads the cache, reads none of the heads that were rotated.

    Args:
        schema: of the folder or repository `where`.
        is_pruned: whether its linear of this name is.

    Raises:
        RiaError: it does, or nothing tells which heads were rotated.
    """
    layers = EngineOptions.current().drafted_layers
    if layers is None or (schema.rotations_digest is None and "rotate" not in schema.unlike_dense):
        return
    if schema.rotations_digest is None:
        raise _refusal(f"{where}: nothing says which heads were")
    for name in rotations_of(where, revision, schema, is_pruned):
        number = re.search(r"\blayers\.(\d+)\.", name)
        if number is None or int(number.group(1)) in layers:
            raise _refusal(f"{where}: {name}: its heads were")


def _refusal(rotated: str) -> RiaError:
    return RiaError(
        f"{rotated} rotated (`compress --rotate heads`), and the draft of --speculative-config reads the values of its "
        "target's KV cache as the dense model has them, so its guesses would be wrong. Serve without "
        "--speculative-config, or compress with --rotate none."
    )
