"""Gemma 4's draft, which reads the values that its target keeps, beside folders whose heads are turned."""

import copy as copies
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import tiny
import torch
from checkpoint_folder import Collecting, add_rotations, config_of, random_rotations
from transformers import Gemma4TextConfig
from vllm.config import get_current_vllm_config
from vllm.v1.spec_decode.gemma4 import Gemma4Proposer
from vllm.v1.worker.gpu.spec_decode.gemma4 import speculator

from ria_vllm.errors import RiaError
from ria_vllm.serve.load.engine import EngineOptions
from ria_vllm.serve.model.reload import check_reload

SLIDING, FULL = "sliding_attention", "full_attention"
READ = "model.layers.1.self_attn.o_proj"  # by the draft of a target with two layers of one type
OTHER = READ.replace("1", "0")


def text(types, shared=0):
    return Gemma4TextConfig(num_hidden_layers=len(types), layer_types=types, num_kv_shared_layers=shared)


def speculative(target, model_type="gemma4_mtp"):
    """What vLLM has for a draft with a layer of each type, beside a target with this text decoder."""
    own = SimpleNamespace(model_type=model_type, layer_types=[SLIDING, FULL], get_text_config=lambda: own)
    return SimpleNamespace(
        draft_model_config=SimpleNamespace(hf_config=own, model="the draft"),
        target_model_config=SimpleNamespace(hf_config=target, model="the target"),
    )


def chosen_by(setup, current):
    """The layers whose cache the draft's layers will read. `setup`: `_setup_gemma4_kv_sharing` of a class."""
    layers = [torch.nn.Module() for _ in range(2)]
    for layer in layers:
        layer.self_attn = SimpleNamespace(attn=SimpleNamespace())
    draft = SimpleNamespace(model=SimpleNamespace(layers=layers))
    options = SimpleNamespace(
        speculative_config=current.speculative_config, model=draft,
        vllm_config=SimpleNamespace(
            model_config=current.speculative_config.target_model_config,
            compilation_config=SimpleNamespace(static_forward_context=defaultdict(SimpleNamespace)),
        ),
    )  # fmt: skip
    names = {"language_model.model.layers.0.self_attn.attn"}
    if setup is Gemma4Proposer._setup_gemma4_kv_sharing:
        setup(options, names)
    else:
        setup(options, draft, names)
    chosen = [layer.self_attn.attn.kv_sharing_target_layer_name for layer in layers]
    return {int(re.search(r"layers\.(\d+)\.", name).group(1)) for name in chosen}


@pytest.fixture
def setups(monkeypatch):
    """How the drafts of vLLM's two runners find their layers."""
    monkeypatch.setattr(speculator, "_copy_target_kv_scales", lambda *_: None)
    classes = Gemma4Proposer, speculator.Gemma4Speculator
    return [one._setup_gemma4_kv_sharing for one in classes]


@pytest.mark.parametrize(
    ("types", "shared"),
    [(([SLIDING] * 4 + [FULL]) * 3, 7), ([FULL, SLIDING, FULL], 1)],
)
def test_the_layers_that_vllms_drafts_read(types, shared, engine, setups):
    current = get_current_vllm_config()
    current.speculative_config = speculative(text(types, shared))
    for setup in setups:
        assert EngineOptions.current().drafted_layers == chosen_by(setup, current)


def plain(types, **more):
    """A text decoder with these attributes alone."""
    own = SimpleNamespace(layer_types=types, get_text_config=lambda: own, **more)
    return own


@pytest.mark.parametrize("layers", [3, 6])
def test_the_layers_where_vllms_runners_count_differently(layers, engine, setups):
    current = get_current_vllm_config()
    target = plain([SLIDING, FULL, SLIDING, FULL, FULL], num_hidden_layers=layers, num_kv_shared_layers=1)
    current.speculative_config = speculative(target)
    by_types, by_number = (chosen_by(setup, current) for setup in setups)
    assert by_types != by_number and EngineOptions.current().drafted_layers == by_types | by_number


def test_drafts_with_keys_and_values_of_their_own(engine):
    current = get_current_vllm_config()
    assert EngineOptions.current().drafted_layers is None
    for model_type in ("eagle", "mtp", "gemma4_text"):
        current.speculative_config = speculative(text([SLIDING, FULL]), model_type)
        assert EngineOptions.current().drafted_layers is None and not EngineOptions.current().shares_cache


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


MESSAGE = f"{re.escape(READ)}: .*--rotate heads.*--speculative-config.*--rotate none"


def test_turned_heads_of_a_layer_that_the_draft_reads(start, copy):
    current = get_current_vllm_config()
    start(copy)
    add_rotations(copy, {OTHER: random_rotations(2), READ: random_rotations(2)})
    for load_format in ("auto", "dummy"):
        current.load_config.load_format = load_format
        with pytest.raises(RiaError, match=MESSAGE):
            start(copy)
        start(copy, current.speculative_config.draft_model_config)  # under the configuration of its target
    current.speculative_config = speculative(text([FULL] * 2), "eagle")
    start(copy)
    current.speculative_config = None
    start(copy)


def test_a_reload_of_turned_heads(start, tmp_path):
    """Without permutations, nothing else tells the folders apart."""
    folders = [tmp_path / name for name in ("plain", "turned")]
    for folder in folders:
        tiny.write(tiny.FAMILIES["llama-gqa"], folder, permuted=False)
    add_rotations(folders[1], {READ: random_rotations(2)})
    config = start(folders[0])
    current = get_current_vllm_config()
    for folder in folders:
        current.model_config = copies.copy(current.model_config)
        current.model_config.model = str(folder)
        if folder == folders[0]:
            check_reload(config, None, from_files=True)
        else:
            with pytest.raises(RiaError, match=MESSAGE):
                check_reload(config, None, from_files=True)
