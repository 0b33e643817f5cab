"""How far the log probabilities of vLLM on one folder are from those of transformers or vLLM on another."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer
from zoo.toy import Toy, auto_class

LENGTHS, TOKENS = (5, 17, 33), 6
# The position of a token among several kinds, which grows with the continuation. It is text, kind 0.
KINDS = ("mm_token_type_ids", "token_type_ids")


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 258, (n,), generator=draw).tolist() for n in LENGTHS]


def text_with_image(toy: Toy) -> str:
    return f"What is here: {toy.processor.placeholder if toy.processor else ''} and why?"


def picture(place: Path) -> Path:
    """A small image of noise."""
    path = place / "picture.png"
    if not path.exists():
        noise = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)
    return path


def job(folder: Path, toy: Toy) -> dict[str, Any]:
    """What `serving.serve` shall run: the prompts, and one with an image if the model reads images."""
    small = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 256}
    engine: dict[str, Any] = {"dtype": toy.dtype} | small
    given: dict[str, Any] = {"model": str(folder), "prompts": prompts(), "tokens": TOKENS}
    with_image = toy.processor and toy.processor.placeholder and not toy.text_only
    if toy.processor:
        number = {"image": 1} if with_image else {"image": 0}
        engine |= {"skip_tokenizer_init": False, "limit_mm_per_prompt": number | {"video": 0, "audio": 0}}
    if with_image:
        ids = AutoTokenizer.from_pretrained(folder)(text_with_image(toy))["input_ids"]
        given |= {"prompts": [*prompts(), ids], "images": [None] * len(LENGTHS) + [str(picture(folder.parent))]}
    return given | {"engine": engine | toy.engine}


def load(folder: Path, toy: Toy) -> torch.nn.Module:
    model = auto_class(toy).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def agreement(results: list[dict[str, Any]], folder: Path, toy: Toy) -> dict[str, dict[str, float]]:
    """ "text" and, if an image was among the prompts, "image" -> how close vLLM's `results` are to transformers.

    `median` and `largest`: |difference| of the log probabilities of all tokens of the prompts and of vLLM's greedy
    continuations. `same`: the share of generated tokens that transformers would have chosen too.
    """
    model = load(folder, toy)
    found = {"text": _numbers([_compare(r, model, {}) for r in results[: len(LENGTHS)]])}
    for result in results[len(LENGTHS) :]:
        processor = AutoProcessor.from_pretrained(folder)
        inputs = processor(
            text=[text_with_image(toy)], images=[Image.open(picture(folder.parent))], return_tensors="pt"
        )
        ids = inputs.pop("input_ids")[0].tolist()
        assert ids == result["prompt_ids"], f"transformers' processor reads {ids}, vLLM {result['prompt_ids']}"
        found["image"] = _numbers([_compare(result, model, dict(inputs))])
    return found


def agreement_of_two(results: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """As `agreement`, between vLLM's results on two folders.

    `same`: the share of generated tokens until the continuations part. What follows is not compared.
    """
    pairs = [_compare_two(*pair) for pair in zip(results, others, strict=True)]
    parts = {"text": pairs[: len(LENGTHS)], "image": pairs[len(LENGTHS) :]}
    return {kind: _numbers(compared) for kind, compared in parts.items() if compared}


def _compare_two(result: dict[str, Any], other: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    assert result["prompt_ids"] == other["prompt_ids"]
    same = torch.tensor(result["tokens"]).eq(torch.tensor(other["tokens"])).cumprod(0).bool()
    upto = int(same.sum()) + 1  # where they part, both chosen tokens must be about as likely
    first, second = (torch.tensor(one["prompt"] + one["logprobs"][:upto]) for one in (result, other))
    return (first - second).abs(), same


@torch.no_grad()
def _compare(
    result: dict[str, Any], model: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """|difference| of each token's log probability, and whether each generated token is transformers' choice."""
    prompt, made = result["prompt_ids"], torch.tensor([result["tokens"]])
    sequence = torch.cat([torch.tensor([prompt]), made], 1)
    longer = {name: torch.cat([inputs[name], torch.zeros_like(made)], 1) for name in KINDS if name in inputs}
    inputs = inputs | longer | {"input_ids": sequence, "attention_mask": torch.ones_like(sequence)}
    logprobs = model(**inputs, use_cache=False).logits[0].float().log_softmax(-1)
    want = logprobs[:-1].gather(-1, sequence[0, 1:, None])[:, 0]
    off = (want - torch.tensor(result["prompt"] + result["logprobs"])).abs()
    return off, logprobs[len(prompt) - 1 : -1].argmax(-1) == made[0]


def _numbers(compared: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    off, same = (torch.cat(parts) for parts in zip(*compared))
    numbers = {"median": off.median(), "largest": off.max(), "same": same.float().mean()}
    return {name: float(f"{value.item():.2g}") for name, value in numbers.items()}
