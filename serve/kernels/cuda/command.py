"""`ria-vllm build-kernels`: compiles the CUDA kernels after installation."""

import time
from pathlib import Path

import click

from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda import build as cuda_compile
from ria_vllm.serve.kernels.cuda.bindings import LIBRARY_FOLDER_VARIABLE, library_folder


@click.command()
@click.option("--arch", "names", multiple=True, help="80 (also 86, 89), 90a, 100a, 120; default: the visible GPUs'.")
@click.option(
    "--tiles",
    type=click.Choice(["default", "all", "small"]),
    default="default",
    show_default=True,
    help="all: candidates too, for gpu_check to measure; small: one tile for each width of values, a quick check.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Compilers at once; default: what cores and memory allow.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help=f"Folder for the libraries; name it in {LIBRARY_FOLDER_VARIABLE} then. Default: beside the package.",
)
def build_kernels(names: tuple[str, ...], tiles: str, jobs: int | None, output: Path | None) -> None:
    """Compile the CUDA kernels. Needs nvcc and `pip install nvidia-cutlass==4.2.0`, no GPU."""
    folder = output or library_folder()
    try:
        targets = [cuda_compile.architecture(name) for name in names] or cuda_compile.visible_architectures()
        if not targets:
            raise RiaError("no GPU is visible here; say which architecture with --arch (80, 90a, 100a or 120)")
        for target in targets:
            start = time.monotonic()
            chosen = {"default": target.default_tiles, "all": target.tiles, "small": target.small_tiles}[tiles]
            path = cuda_compile.compile_library(target, folder, chosen, click.echo, jobs)
            click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB in {time.monotonic() - start:.0f} s")
    except (cuda_compile.CudaBuildError, OSError) as error:
        raise RiaError(str(error)) from error
