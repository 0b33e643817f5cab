"""How far the log probabilities of vLLM on one folder are from those of transformers on another."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.toy import Toy, auto_class

LENGTHS, TOKENS = (5, 17, 33), 6


@dataclass(frozen=True)
class Agreement:
    """Over the tokens of all prompts and of vLLM's greedy continuations: |difference| of the log probabilities.

    `same` is the share of generated tokens that transformers would have chosen too.
    """

    median: float
    largest: float
    same: float

    @property
    def good(self) -> bool:
        return self.median < 1e-3 and self.largest < 1e-2 and self.same > 0.99

    def as_json(self) -> dict[str, float]:
        return {name: float(f"{value:.2g}") for name, value in asdict(self).items()}


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 258, (n,), generator=draw).tolist() for n in LENGTHS]


def job(folder: Path, toy: Toy) -> dict[str, Any]:
    """What `serving.serve` shall run."""
    engine: dict[str, Any] = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 4}
    if toy.processor:
        engine |= {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0}}
    return {"model": str(folder), "prompts": prompts(), "tokens": TOKENS, "engine": engine | toy.engine}


def load(folder: Path, toy: Toy) -> torch.nn.Module:
    model = auto_class(toy).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def agreement(results: list[dict[str, Any]], model: torch.nn.Module) -> Agreement:
    off, same = [], []
    for prompt, result in zip(prompts(), results, strict=True):
        sequence = torch.tensor([prompt + result["tokens"]])
        logprobs = model(input_ids=sequence, use_cache=False).logits[0].float().log_softmax(-1)
        want = logprobs[:-1].gather(-1, sequence[0, 1:, None])[:, 0]
        off.append((want - torch.tensor(result["prompt"] + result["logprobs"])).abs())
        same.append(logprobs[len(prompt) - 1 : -1].argmax(-1) == sequence[0, len(prompt) :])
    everywhere = torch.cat(off)
    return Agreement(everywhere.median().item(), everywhere.max().item(), torch.cat(same).float().mean().item())
