"""Whether weights may be reloaded into a running server, which has folded the permutations of its present weights."""

from vllm.config import ModelConfig

from ria_vllm.checkpoint import is_compressed, read_json
from ria_vllm.errors import RiaError
from ria_vllm.schema import RiaSchema
from ria_vllm.serve.checkpoint_files import WeightHeaders, check_weight_files, locate, permutations_of, stored_modules
from ria_vllm.serve.config import RiaConfig
from ria_vllm.serve.engine import EngineOptions


def check_reload(config: RiaConfig, built_from: ModelConfig | None, from_files: bool) -> None:
    """Check that a reload brings weights that store the same linears in the same channel orders.

    Args:
        config: of the running model.
        built_from: vLLM's configuration of the model when it was built. By now vLLM may have another one.
        from_files: vLLM reads the weights from the model's files; otherwise somebody sends them, by their names.

    Raises:
        RiaError: the weights are stored differently, or their files do not belong together.
    """
    if config.unread is not None:
        raise RiaError(
            f"{config.unread} This server was started with dummy weights, which did not need that. Start it again "
            "instead of loading other weights."
        )
    model_config = EngineOptions.current().model_config or built_from
    if model_config is None or not from_files:
        return
    model, revision = str(model_config.model), model_config.revision
    path = locate(model, "config.json", revision)
    if path is None:
        return  # the weights come from elsewhere, by their names
    if is_compressed(path.parent) != (config.compressed_tensors is None):
        raise RiaError(
            f"{model}: its weights are stored in another form than those that this server was started with. Start a "
            "server of that folder instead of reloading."
        )
    if config.compressed_tensors is not None:
        return
    schema = RiaSchema.parse(read_json(path)["quantization_config"], str(path))
    permutations_of(model, revision, schema)
    headers = WeightHeaders(model, revision)
    check_weight_files(headers, schema)
    pruned = {name for name, sparse in stored_modules(headers.names or []).items() if sparse}
    if config.pruned is not None and pruned != config.pruned:
        raise RiaError(
            f"{model}: {min(pruned ^ config.pruned)} is pruned in the folder or on this server, but not on both. Start "
            "a server of that folder instead of reloading."
        )
    stored, present_form = (
        (one.weight_format, getattr(one, "input_activations", None)) for one in (schema, config.schema)
    )
    if stored != present_form:
        raise RiaError(
            f"{model}: its weights are {stored[0].name}, or its activations are rounded, unlike those that this server "
            f"was started with ({present_form[0].name}). Start a server of that folder instead of reloading."
        )
    orders, present = ((one.permutations_digest, one.folds, one.experts) for one in (schema, config.schema))
    if orders != present:
        raise RiaError(
            f"{model}: its weights are stored in other channel orders than those that this server has folded. Start "
            "a server of that folder instead of reloading."
        )
