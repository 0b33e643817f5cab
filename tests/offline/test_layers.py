"""The pass over the decoder layers."""

from dataclasses import replace

import pytest
import torch
from compressing import digests, edited, interrupted_after_a_layer, run_small
from transformers import AutoModelForCausalLM

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration import embed
from ria_vllm.offline.calibration.data import from_text
from ria_vllm.offline.model.run.hf import load_tokenizer
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run import compress as compressing
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.offline.run.layers import LayerPass
from ria_vllm.progress import Monitor


def test_layers_behind_the_last_pruned_one_are_written_but_not_run(tiny, text, tmp_path, monkeypatch):
    ran, load = [], LayerPass._load
    monkeypatch.setattr(LayerPass, "_load", lambda self, index: ran.append(index) or load(self, index))
    run_small(tiny("llama"), tmp_path / "all", text)
    assert ran == [0, 1]
    run_small(tiny("llama"), tmp_path / "first", text, ignore=(r"layers\.1\.",))
    with interrupted_after_a_layer():
        run_small(tiny("llama"), tmp_path / "again", text, ignore=(r"layers\.1\.",))
    run_small(tiny("llama"), tmp_path / "again", text, Settings(resume=True), ignore=(r"layers\.1\.",))
    assert ran == [0, 1, 0, 0]
    assert digests(tmp_path / "again") == digests(tmp_path / "first")
    whole, first = Reader(tmp_path / "all"), Reader(tmp_path / "first")
    dense = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype="auto").state_dict()
    of_layer = {number: {name for name in first.files if f"layers.{number}." in name} for number in (0, 1)}
    assert of_layer[0] == {name for name in whole.files if "layers.0." in name} and len(of_layer[1]) == 9
    assert all(torch.equal(first.tensor(name), whole.tensor(name)) for name in of_layer[0])
    assert all(torch.equal(first.tensor(name), dense[name]) for name in of_layer[1])


@pytest.mark.parametrize("without", ["self_attn.q_proj", "mlp.down_proj"])
def test_the_dense_stream_also_passes_a_sublayer_that_has_nothing_to_prune(without, tiny, text, tmp_path, monkeypatch):
    """Compared with transformers' hidden states after the first layer."""
    survey, calibration_tokens, free = embed.survey, compressing.calibration_tokens, LayerPass._free
    seen, dense = {}, {}

    def surveyed(*arguments):
        found = survey(*arguments)
        return replace(found, kinds=tuple(map(emptied, found.kinds)))

    def emptied(topology):
        parts = [replace(part, stages=()) if without in part.linears else part for part in topology.sublayers]
        assert parts != list(topology.sublayers) and len(parts) == 2
        return replace(topology, sublayers=tuple(parts), folds=(), rotations=(), migrations=())

    def read(*arguments):
        seen["tokens"] = calibration_tokens(*arguments)
        return seen["tokens"]

    def freed(self, index):
        stream = self.streams.dense
        dense[index] = torch.cat([stream[number].float() for number in range(len(stream))])
        free(self, index)

    monkeypatch.setattr(embed, "survey", surveyed)
    monkeypatch.setattr(compressing, "calibration_tokens", read)
    monkeypatch.setattr(LayerPass, "_free", freed)
    recipe = Recipe(calibration=str(text), samples=4, seq_len=32)
    report = compress(str(tiny("llama")), tmp_path / "out", recipe, Settings(), Monitor(shown=False))
    assert report["linears"] and not any(name.endswith(without) for name in report["linears"])
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    with torch.no_grad():
        wanted = model(seen["tokens"], output_hidden_states=True).hidden_states[1]
    assert torch.allclose(dense[0].view_as(wanted), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_a_dense_model_that_overflows_is_named_where_the_pruned_one_does_not(tiny, text, tmp_path):
    """One channel of the first MLP's output slightly exceeds what float16 can hold. The pruned one is smaller."""
    name, largest = "model.layers.0.mlp.down_proj", torch.finfo(torch.float16).max
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda _, __, output: seen.append(output.abs().amax((0, 1))))
    with torch.no_grad():
        model(from_text(str(text), load_tokenizer(str(tiny("llama"))), 4, 32, 0).long())

    def enlarge(tensors):
        tensors[f"{name}.weight"][0] *= 1.01 * largest / seen[0][0]
        return {key: tensor.half() for key, tensor in tensors.items()}

    source = edited(tiny("llama"), tmp_path / "in", enlarge, dtype="float16")
    with pytest.raises(RiaError, match=f"in: {name}: NaN or infinite values in the dense model's activations.*float32"):
        run_small(source, tmp_path / "out", text, reconstruct="admm", compute_dtype="float16")
