"""Servers that run already: what is found out about them, and whom the key reaches."""

import math

import pytest
from server_stand_in import Quiet, StandIn, listening, serving

from ria_vllm.errors import RiaError
from ria_vllm.progress import Monitor
from ria_vllm.serve.benchmark.engines import OpenAi, Vllm
from ria_vllm.serve.benchmark.llama_cpp import LlamaCpp
from ria_vllm.serve.benchmark.quality import TextQuality, Unanswered
from ria_vllm.serve.benchmark.server import ask, found_running


@pytest.mark.parametrize(
    ("owner", "engine"), [("vllm", Vllm), ("llamacpp", LlamaCpp), ("library", OpenAi), (None, OpenAi)]
)
def test_its_model_and_its_program(owner, engine):
    side = StandIn()
    side.models = [{"id": "org/m", "owned_by": owner}]
    with serving(side) as server:
        found = found_running(server.url)
    assert (found.url, found.model_name, type(found.engine)) == (server.url, "org/m", engine)
    assert found.process is None and found.memory() == 0 and found.end_of_log() == ""


def test_one_of_several_models():
    """Adapters are models, too, but none that is meant without its name."""
    side = StandIn()
    side.models = [{"id": "a", "parent": None}, {"id": "lora", "parent": "a"}]
    with serving(side) as server:
        assert [found_running(server.url + end).model_name for end in ("", "#a", "#lora")] == ["a", "a", "lora"]
        side.models.append({"id": "b"})
        for end in ("", "#c"):
            with pytest.raises(RiaError, match="has the models a, b. Choose one: .*#MODEL"):
                found_running(server.url + end)
        for models in ([], [{}], {}, [3], None):
            side.models = models
            with pytest.raises(RiaError, match="no list of models|has the models \\(none\\)"):
                found_running(server.url)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("to be, or not to be?" * 4)
    return path


def test_quality_is_measured_where_it_gives_logprobs(text):
    """And whether it does is found out before it is loaded."""
    side, quality = StandIn(), TextQuality(text, 32, 64)
    with serving(side) as server:
        found = found_running(server.url)
        quality.check("theirs", found)
        measured = quality.measure("theirs", found, Monitor(shown=False))
        tokens = text.read_bytes()[:64]
        pairs = [pair for start in (0, 32) for pair in zip(tokens[start : start + 31], tokens[start + 1 : start + 32])]
        likelihoods = [float(side.logprobs[pair]) for pair in pairs]
        assert measured.perplexity == pytest.approx(math.exp(-sum(likelihoods) / len(likelihoods)), rel=1e-5)
        side.answer = lambda path, usual: (400, "max allowed: 20") if "completions" in path else (200, usual)
        with pytest.raises(Unanswered, match="theirs: no answer .*max allowed: 20"):
            quality.check("theirs", found)
        side.answer = lambda path, usual: (200, {} if "tokenize" in path else usual)
        with pytest.raises(Unanswered, match="theirs: its server does not answer with the text's tokens"):
            quality.check("theirs", found)
        side.models[0]["owned_by"] = "library"
        with pytest.raises(Unanswered, match="theirs: only vLLM's and llama.cpp's servers give logprobs"):
            quality.check("theirs", found_running(server.url))


def answering(answer):
    """The URL of a server that answers a GET request by `answer(handler)`."""
    return listening(type("Handler", (Quiet,), {"do_GET": answer}))


def test_the_key_is_not_sent_on_to_where_a_server_points(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "KEY")
    keys = []

    def elsewhere(handler):
        keys.append(handler.headers["Authorization"])
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"{}")

    def pointing(handler):
        keys.append(handler.headers["Authorization"])
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()

    with answering(elsewhere) as target, answering(pointing) as url:
        assert ask(url) == b"{}"
    assert keys == ["Bearer KEY", None]
