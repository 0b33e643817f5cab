"""The entry point that vLLM calls in each of its processes (group `vllm.general_plugins`)."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch


def register() -> None:
    """Register quant_method "ria" with vLLM.

    Raises:
        RiaError: this vLLM lacks names that are used.
    """
    import vllm

    from ria_vllm.errors import RiaError
    from ria_vllm.serve import vllm_names

    vllm_names.check_version(vllm.__version__)
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
        from vllm.v1.worker.worker_base import WorkerBase

        from ria_vllm.format.schema import QUANT_METHOD
        from ria_vllm.serve.load.layerwise import watch_reloads
        from ria_vllm.serve.model.config import RiaConfig
        from ria_vllm.serve.proving import served

        if QUANT_METHOD not in QUANTIZATION_METHODS:
            register_quantization_config(QUANT_METHOD)(RiaConfig)
            watch_models()
            watch_reloads()
            WorkerBase.ria_prove = served.prove
    except (AttributeError, ImportError) as error:
        if "vllm" not in str(error):
            raise
        raise RiaError(f"vLLM {vllm.__version__}: {error}. {vllm_names.way_out()}") from error


def watch_models() -> None:
    """Have `ria_vllm.serve.model.layer_matching` see every model that is built with our config, complete and not yet
    loaded.

    vLLM has no hook for that. The last thing that `initialize_model` does with a model is to record its parameters.
    Models inside a model are built by the same function; only the outermost has the paths that the checkpoint knows.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader import utils

    from ria_vllm.errors import RiaError
    from ria_vllm.format import proofs
    from ria_vllm.serve.linear.method import arrival_checks
    from ria_vllm.serve.load.completeness import check_loaded, empty_weights
    from ria_vllm.serve.load.engine import EngineOptions, models_being_built
    from ria_vllm.serve.load.stream import Hooks, Taker, WeightStream
    from ria_vllm.serve.model.adapters import rotate_adapters
    from ria_vllm.serve.model.cache_readers import check_rotated_heads
    from ria_vllm.serve.model.config import RiaConfig
    from ria_vllm.serve.model.layer_matching import match_layers
    from ria_vllm.serve.model.reload import check_first_load, check_reload, proofs_of
    from ria_vllm.serve.proving.layers import Prover

    record = utils.record_metadata_for_reloading

    @functools.wraps(record)
    def record_metadata_for_reloading(model: torch.nn.Module) -> None:
        config, calls = get_current_vllm_config().quant_config, models_being_built()
        if isinstance(config, RiaConfig) and len(calls) == 1:
            engine = EngineOptions.current()
            match_layers(config, model)
            taken: dict[str, Taker | None] = {}
            if config.rearranged and config.stored is not None:
                from ria_vllm.serve.model import rearranged

                taken |= rearranged.takers(model, config.required)
            if config.experts:
                from ria_vllm.serve.model import experts_matching

                taken |= experts_matching.takers(config, model)
            # A draft may be built with the configuration of its target, but has files of its own.
            built_from = calls[0].get("model_config") or engine.model_config
            where = str(built_from.model) if built_from is not None else config.where
            embeddings = built_from is engine.model_config
            revision = getattr(built_from, "revision", None)
            with config.excused():
                check_rotated_heads(config.schema, config.where, revision, config.is_pruned)
            rotate_adapters(config, model, revision)
            empty_weights(model, embeddings)

            def after_reload(left_out: Sequence[str]) -> None:
                present = EngineOptions.current().model_config if embeddings else None
                if left_out:
                    raise RiaError(
                        f"{where if present is None else present.model}: vLLM's layer {left_out[0]} got no weights in "
                        "this reload, while others are new. Reload all files of one model."
                    )

            prover = Prover(config, model, taken, embeddings)
            computed = config.file_proofs() if proofs.wanted() else None

            def prove(sent: Mapping[str, torch.Tensor] | None, first: bool) -> None:
                # Only later may vLLM have another configuration of this model; at first, perhaps one of its target.
                present = (EngineOptions.current().model_config if embeddings and not first else None) or built_from
                if not proofs.wanted() or present is None:
                    return
                if first and str(present.model) != config.where:
                    return  # a draft that is built with the configuration of its target has other files
                if computed is not None and sent is None:
                    prover.prove(computed.vector, computed.take(), str(present.model))
                if computed is not None or (sent is not None and config.schema.proofs is None):
                    return
                schema, stored = (config.schema, sent) if sent is not None else proofs_of(config, present)
                prover.prove(schema.proof_vector, stored, str(present.model))

            def prove_served() -> tuple[str | None, int]:
                schema, stored = proofs_of(config, EngineOptions.current().model_config)
                return schema.proofs and schema.proofs.digest, prover.prove(schema.proof_vector, stored, where)

            model.ria_prove = prove_served
            hooks = Hooks(
                before_reload=functools.partial(check_reload, config, engine.model_config, lora=engine.lora),
                check_files=functools.partial(check_first_load, config, built_from, lora=engine.lora),
                after_load=functools.partial(check_loaded, model, where, embeddings),
                after_reload=after_reload, prove=prove, arrivals=arrival_checks(model), takers=taken,
                translation=config.translation, loaded=engine.dummy_weights, embeddings=embeddings,
            )  # fmt: skip
            WeightStream(
                model, hooks if computed is None else replace(hooks, watch=computed.see, forget=computed.forget)
            )
        record(model)

    utils.record_metadata_for_reloading = record_metadata_for_reloading
