"""Gemma 4's draft, which reads the values that its target keeps, beside folders whose heads are rotated."""

import copy as copies
import json
from types import SimpleNamespace

import pytest
from checkpoint_folder import Collecting, config_of
from transformers import Gemma4TextConfig
from vllm.config import get_current_vllm_config

from ria_vllm.errors import RiaError
from ria_vllm.serve.load.engine import EngineOptions
from ria_vllm.serve.model.reload import check_reload

SLIDING, FULL = "sliding_attention", "full_attention"


def text(types, shared=0):
    return Gemma4TextConfig(num_hidden_layers=len(types), layer_types=types, num_kv_shared_layers=shared)


def speculative(target, model_type="gemma4_mtp"):
    """What vLLM has for a draft with a layer of each type, beside a target with this text decoder."""
    own = SimpleNamespace(model_type=model_type, layer_types=[SLIDING, FULL], get_text_config=lambda: own)
    return SimpleNamespace(
        draft_model_config=SimpleNamespace(hf_config=own, model="the draft"),
        target_model_config=SimpleNamespace(hf_config=target, model="the target"),
    )


def test_drafts_with_keys_and_values_of_their_own(engine):
    current = get_current_vllm_config()
    for model_type in ("eagle", "mtp", "gemma4_text"):
        current.speculative_config = speculative(text([SLIDING, FULL]), model_type)
        assert not EngineOptions.current().draft_reads_cache and not EngineOptions.current().shares_cache


@pytest.fixture
def start(watched):
    """Call with a folder, and perhaps what is built: the model, as vLLM builds it and our plugin sees it."""
    from vllm.model_executor.model_loader import utils

    watched.speculative_config = speculative(text([FULL] * 2))

    def start(folder, built=None):
        watched.quant_config = config_of(folder)
        watched.model_config = SimpleNamespace(
            model=str(folder), revision=None, runner_type="generate", head_dtype=None, dtype=None, hf_config=None
        )
        utils.initialize_model(watched, model_class=Collecting, model_config=built or watched.model_config)
        return watched.quant_config

    return start


MESSAGE = "heads were rotated .*--speculative-config.*--rotate none"


def rotate(folder):
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"]["recipe"]["rotate"] = "heads"
    (folder / "config.json").write_text(json.dumps(content))


def test_rotated_heads_and_a_draft_that_reads_them(start, copy):
    current = get_current_vllm_config()
    start(copy)
    rotate(copy)
    for load_format in ("auto", "dummy"):
        current.load_config.load_format = load_format
        with pytest.raises(RiaError, match=MESSAGE):
            start(copy)
        start(copy, current.speculative_config.draft_model_config)  # under the configuration of its target
    current.speculative_config = speculative(text([FULL] * 2), "eagle")
    start(copy)


def test_a_reload_of_rotated_heads(start, checkpoint, copy):
    config, current = start(checkpoint), get_current_vllm_config()
    current.model_config = copies.copy(current.model_config)
    current.model_config.model = str(copy)
    check_reload(config, None, from_files=True)
    rotate(copy)
    with pytest.raises(RiaError, match=MESSAGE):
        check_reload(config, None, from_files=True)
