"""The teacher's answers, computed or cached."""

import pytest
import torch
from compressing import weight_digests
from decoders import small

from ria_vllm.checkpoint.writer import CheckpointWriter
from ria_vllm.errors import RiaError
from ria_vllm.offline.distill.divergence import Top
from ria_vllm.offline.distill.logits import TwoPart
from ria_vllm.offline.distill.loss import Loss
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.run import Settings, distill
from ria_vllm.offline.distill.teacher import CachedTeacher, Teacher, fill_cache
from ria_vllm.progress import Monitor

K = 8


@pytest.fixture
def model():
    return TwoPart(small("llama"), "teacher")


def windows() -> torch.Tensor:
    return torch.randint(2, 250, (5, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cached_answers_are_the_most_probable_tokens(model, temperature, tmp_path, monkeypatch):
    monkeypatch.setattr("ria_vllm.offline.distill.teacher.CHUNK", 7)
    writer = CheckpointWriter(tmp_path / "out")
    fill_cache(writer, model, windows(), K, temperature, Monitor(shown=False), range(5))
    top = CachedTeacher(writer, torch.device("cpu")).answer(windows()[[3, 1]], [3, 1]).top
    logits = model.model(input_ids=windows()[[3, 1]]).logits.flatten(0, 1)
    wanted = (logits.double() / temperature).log_softmax(-1).sort(descending=True)
    assert torch.equal(top.tokens, wanted.indices[:, :K])
    assert torch.allclose(top.logs.double(), wanted.values[:, :K], atol=4e-3)


def test_a_cache_that_was_interrupted_is_completed(model, tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path / "out")
    fill_cache(writer, model, windows(), K, 1.0, Monitor(shown=False), range(3))
    asked = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens: asked.append(1) or hidden(tokens))
    fill_cache(writer, model, windows(), K, 1.0, Monitor(shown=False), range(5))
    assert len(asked) == 2 and writer.has("teacher-00000004")


def test_layers_are_the_outputs_of_decoder_layers(model):
    answer = Teacher(model, layers=True).answer(windows(), [])
    states = model.model(input_ids=windows(), output_hidden_states=True).hidden_states
    assert torch.equal(answer.layers[0], states[1]) and len(answer.layers) == 2
    assert torch.equal(model.model.model.norm(answer.layers[1]), states[2])
    assert torch.equal(answer.hidden, states[2].flatten(0, 1))
    assert Teacher(model).answer(windows(), []).layers == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_teacher_that_is_no_model_is_not_taken_for_training_that_diverges(value, model, tmp_path):
    with torch.no_grad():
        model.model.model.norm.weight[3] = value
    with pytest.raises(RiaError, match="teacher: the teacher itself computes NaN or infinity in float32"):
        Teacher(model).answer(windows(), [])
    with pytest.raises(RiaError, match="teacher: the teacher itself computes NaN or infinity in float32"):
        fill_cache(CheckpointWriter(tmp_path / "out"), model, windows(), K, 1.0, Monitor(shown=False), range(5))


def test_a_model_that_computes_nan_is_not_taken_for_one_that_cannot_be_distilled(model):
    with torch.no_grad():
        model.model.model.norm.weight[3] = torch.nan
    with pytest.raises(RiaError, match="teacher: computes NaN in float32. Check that the model works\\.$"):
        TwoPart(model.model, "teacher")


def test_a_run_with_a_cache_is_one_without_it_but_for_logarithms_in_float16(pruned, text, tmp_path, monkeypatch):
    """Of probabilities at the loss's temperature, of all windows in each pass."""
    dense, folder = pruned()

    def run(out: str, cached: bool) -> dict[str, str]:
        recipe = Distillation(
            tokens=512, seq_len=64, text=str(text), micro_batch=1, passes=2, lr=1e-3, cache_teacher=cached,
            loss=Loss(top_k=K, temperature=2.0),
        )  # fmt: skip
        distill(folder, str(dense), tmp_path / out, recipe, Settings(), Monitor(shown=False))
        return weight_digests(tmp_path / out)

    cached, exact, of = run("cached", True), run("exact", False), Top.of

    def rounded(logits: torch.Tensor, k: int, temperature: float) -> Top:
        top = of(logits, k, temperature)
        return Top(top.tokens, top.logs.to(torch.float16).float())

    monkeypatch.setattr(Top, "of", rounded)
    assert run("rounded", False) == cached != exact
