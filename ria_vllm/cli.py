"""The `ria-vllm` command. Each subcommand is imported from its own stage only when it is called."""

import faulthandler
import importlib
import sys

import click

from ria_vllm import __version__
from ria_vllm.errors import RiaError

# Strings, not imports: the shared modules must not depend on the two stages, and `--help` must not load torch.
COMMANDS = {
    "plan": ("ria_vllm.offline.planning", "plan", "Say what compress would take, and what would come of it."),
    "compress": ("ria_vllm.offline.commands", "compress", "Prune a model and write a compressed checkpoint."),
    "distill": ("ria_vllm.offline.distill.command", "distill", "Train what pruning kept towards the dense model."),
    "inspect": ("ria_vllm.folder_commands", "inspect", "Show what a compressed checkpoint holds."),
    "verify": ("ria_vllm.folder_commands", "verify", "Check every invariant of a compressed checkpoint."),
    "export": ("ria_vllm.folder_commands", "export", "Write a plain dense Hugging Face folder."),
    "eval": ("ria_vllm.offline.evaluation.evaluate", "evaluate", "Measure perplexity on a text, or task scores."),
    "doctor": ("ria_vllm.serve.doctor", "doctor", "Show which kernels this machine runs, and why."),
    "bench": (
        "ria_vllm.serve.benchmark.command",
        "bench",
        "Serve compressed, dense and other models in turn; compare their speed and quality.",
    ),
    "build-kernels": ("ria_vllm.serve.kernels.cuda.command", "build_kernels", "Compile the CUDA kernels."),
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in COMMANDS.items()])


@click.group(cls=LazyGroup)
@click.version_option(__version__)
def group() -> None:
    """Prune language models to 2:4 with RIA and channel permutation, and serve them with vLLM."""


def main() -> None:
    """Run the command line; a RiaError becomes one line on stderr and exit status 2.

    A file that is truncated while it is mapped ends the process; then at least the place is printed.
    """
    faulthandler.enable(2)
    try:
        group()
    except RiaError as error:
        click.echo(f"ria-vllm: {error}", err=True)
        sys.exit(2)
