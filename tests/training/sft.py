"""TRL's SFT of a pruned model, in as many processes as there are."""

from pathlib import Path

import torch
from datasets import Dataset
from sparse_llama import load, masks, outside
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from ria_vllm.training import keep_sparse, save

STEPS, CONVERSATIONS = 3, 4  # of a step, in all processes


def main(folder: Path, chats: Path, out: Path, ranks: int) -> None:
    """Every rank checks after every step that nothing outside the masks has changed; the first one writes OUT/new."""
    model, kept = load(folder), masks(folder)
    keep_sparse(model)

    class Checked(SFTTrainer):
        def training_step(self, model, *arguments):
            assert list(outside(self.model, kept)) == []
            return super().training_step(model, *arguments)

    trainer = Checked(
        model,
        args=SFTConfig(
            str(out / "sft"), max_steps=STEPS, learning_rate=1e-3, per_device_train_batch_size=CONVERSATIONS // ranks,
            max_length=64, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
        ),
        train_dataset=Dataset.from_json(str(chats)), processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    trainer.train()
    assert list(outside(trainer.model, kept)) == [] and trainer.accelerator.num_processes == ranks
    saved = save(trainer.model, out / "new", like=folder, tokenizer=trainer.processing_class)
    assert (saved is None) == (trainer.args.process_index > 0)
    if ranks > 1:
        torch.distributed.destroy_process_group()
