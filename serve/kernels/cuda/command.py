"""`ria-vllm build-kernels`: compiles the CUDA kernels after installation."""

import time
from pathlib import Path

import click

from ria_vllm.errors import RiaError
from ria_vllm.progress import Monitor
from ria_vllm.serve.kernels.cuda import build
from ria_vllm.serve.kernels.cuda.architectures import CudaBuildError, find_architecture
from ria_vllm.serve.kernels.cuda.bindings import LIBRARY_FOLDER_VARIABLE, library_folder


@click.command()
@click.option(
    "--arch",
    "names",
    multiple=True,
    help="80 (also for 86 and 89), 90a, 100a or 120; may be repeated. Default: the visible GPUs'.",
)
@click.option(
    "--tiles",
    type=click.Choice(["default", "all", "small"]),
    default="default",
    show_default=True,
    help="all: candidates too, for gpu_check to measure. small: one tile for each width of values, for a quick check.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help=f"Folder for the libraries; then set {LIBRARY_FOLDER_VARIABLE} to it. Default: inside the package.",
)
def build_kernels(names: tuple[str, ...], tiles: str, out: Path | None) -> None:
    """Compile the CUDA kernels. Needs nvcc and `pip install nvidia-cutlass==4.2.0`, but no GPU."""
    folder, monitor = out or library_folder(), Monitor()
    try:
        targets = [find_architecture(name) for name in names] or build.visible_architectures()
        if not targets:
            raise RiaError("no GPU is visible; name an architecture with --arch (80, 90a, 100a or 120)")
        for target in targets:
            start = time.monotonic()
            chosen = {"default": target.default_tiles, "all": target.tiles, "small": target.small_tiles}[tiles]
            with monitor.live(), monitor.phase(f"compiling sm_{target.name}"):
                path = build.compile_library(target, folder, chosen, click.echo)
            click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB in {time.monotonic() - start:.0f} s")
    except (CudaBuildError, OSError) as error:
        raise RiaError(str(error)) from error
