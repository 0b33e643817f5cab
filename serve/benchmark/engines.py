"""Which program serves a model, how it is started, and how it is asked."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ria_vllm.checkpoint.weight_files import weight_files
from ria_vllm.serve.benchmark.llama_cpp import Ask, LlamaCpp, vllm_threads

VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


class Vllm:
    """Serves folders and hub ids. Its completions take token ids and give, for every token of the prompt, its logprob
    and those of the likeliest ones (`prompt_logprobs`), in float32 and before any temperature."""

    client_arguments: tuple[str, ...] = ()
    counts_tokens = True

    def command(self, model: str, port: int, arguments: Sequence[str]) -> list[str]:
        asked = [*arguments, "--served-model-name", model, "--host", "127.0.0.1", "--port", str(port)]
        return [*VLLM, "serve", model, *asked]

    def arguments(self, of_vllm: Sequence[str], users: int, tokens: int) -> Sequence[str]:
        return of_vllm

    def threads(self) -> int | None:
        return vllm_threads()

    def weight_files(self, model: str) -> set[Path]:
        return set(weight_files(Path(model)).values())

    def tokenize(self, ask: Ask, model: str, text: str) -> tuple[list[int], int]:
        answer = ask("/tokenize", {"model": model, "prompt": text})
        return answer["tokens"], answer["max_model_len"]

    def prompt_logprobs(self, ask: Ask, model: str, window: list[int], top: int) -> list[dict[int, float]]:
        request = {"model": model, "prompt": window, "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
        positions = ask("/v1/completions", request)["choices"][0]["prompt_logprobs"][1:]
        return [{int(token): float(entry["logprob"]) for token, entry in one.items()} for one in positions]


class OpenAi:
    """Whatever else runs at a URL. Of its models it tells their names."""

    client_arguments: tuple[str, ...] = ()
    counts_tokens = True

    def arguments(self, of_vllm: Sequence[str], users: int, tokens: int) -> Sequence[str]:
        return []

    def threads(self) -> None:
        return None

    def weight_files(self, model: str) -> set[Path]:
        return set()


Engine = Vllm | LlamaCpp | OpenAi
# What servers say in the lists of their models.
OWNERS: dict[str, type[Vllm] | type[LlamaCpp]] = {"vllm": Vllm, "llamacpp": LlamaCpp}


def engine_of(model: str) -> Engine:
    """What serves a model; of a URL, as long as it was not asked."""
    if is_url(model):
        return OpenAi()
    return LlamaCpp() if model.endswith(".gguf") or quantization_of(model) else Vllm()


def is_url(model: str) -> bool:
    return re.match("https?://", model, re.IGNORECASE) is not None


def quantization_of(model: str) -> tuple[str, str] | None:
    """Model and type of MODEL:TYPE; None for other models, and for paths that exist."""
    found = re.fullmatch(r"(.+):(\w+)", model)
    return None if found is None or is_url(model) or Path(model).exists() else (found[1], found[2])
