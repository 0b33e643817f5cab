"""Write a mixture of experts with random weights into FOLDER, as Hugging Face has them.

The default is the Qwen3-MoE of 1.1 billion bfloat16 weights whose figures are in docs/lab/kernels-cpu.md. It takes
2.3 GB of disk. What was measured is then (TEXT is any text: it changes the answers, but not the speed):

\b
    ria-vllm compress FOLDER -o OUT --data TEXT --reconstruct none
    ria-vllm bench OUT --baseline FOLDER --input-len 128 --output-len 64
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch

if TYPE_CHECKING:
    from transformers import Qwen3MoeConfig

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class MoE:
    """The sizes of a Qwen3-MoE whose layers all have experts."""

    layers: int = 20
    hidden: int = 1024
    experts: int = 32
    intermediate: int = 512  # of each expert
    top_k: int = 8
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 64
    vocabulary: int = 32000

    def config(self) -> "Qwen3MoeConfig":
        from transformers import Qwen3MoeConfig

        return Qwen3MoeConfig(
            num_hidden_layers=self.layers, hidden_size=self.hidden, num_experts=self.experts,
            moe_intermediate_size=self.intermediate, num_experts_per_tok=self.top_k, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, head_dim=self.head_dim, vocab_size=self.vocabulary,
            max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip


def write(moe: MoE, folder: Path) -> None:
    """Save the model and its tokenizer. The memory holds the whole model."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(moe.config(), dtype=DTYPE).save_pretrained(folder)
    save_tokenizer(moe.vocabulary, folder)


def save_tokenizer(vocabulary: int, folder: Path) -> None:
    """A token for each byte, and others that stand for nothing, so that every output of the model is one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *letters]
    tokens += [f"<{number}>" for number in range(len(tokens), vocabulary)]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    write(MoE(), folder)


if __name__ == "__main__":
    main()
