"""What the documentation names exists: files, links, anchors, modules and commands."""

import importlib.util
import re
from pathlib import Path

import pytest
from manifests import manifests

from ria_vllm.cli import COMMANDS
from ria_vllm.installing import FOR_CPUS, FOR_GPUS, FROM_PYPI, VLLM, WHEEL

ROOT = Path(__file__).parents[1]
FOLDERS = "benchmarks|demo|docs|offline|packaging|ria_vllm|serve|tests"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("docs/lab/*.md")])


def anchors(page: Path) -> set[str]:
    """The anchors of a page: those GitHub makes from headings, and explicit ones."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_modules_and_commands_exist(page):
    text = page.read_text()
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)", text):
        assert "NAME" in path or (ROOT / path).exists() or (ROOT / f"{path}.py").exists(), path
    for module in re.findall(r"python3? -m ((?:ria_vllm|benchmarks)[\w.]*)", text):
        assert importlib.util.find_spec(module), module
    code = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL) + re.findall(r"`([^`\n]+)`", text)
    for command in re.findall(r"^ria-vllm ([a-z-]+)", "\n".join(code), re.MULTILINE):
        assert command in COMMANDS, command


def in_a_clone(step: str) -> str:
    return re.sub("ria-vllm(?=\\[|$)", ".", step)


def test_commands_and_cards_name_the_steps_of_an_installation_that_the_readme_has():
    """The README's reader has a clone. vLLM's own wheel goes first."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"```\n(python3 -m venv .*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block is not None and f"`{in_a_clone(FOR_GPUS)}`" in block[1]
    lines = [re.split(r"\s+#", line)[0] for line in block[1].splitlines()]
    assert lines[1 : 1 + len(FOR_CPUS)] == [in_a_clone(step) for step in FOR_CPUS]
    assert lines[1 + len(FOR_CPUS)].startswith("ria-vllm compress")
    page = (ROOT / "docs" / "install.md").read_text().replace("$V", VLLM)
    assert f"\nV={VLLM}\nURL={WHEEL}\n" in page
    assert page.index(FOR_CPUS[1].replace(WHEEL, "$URL").replace("ria-vllm", ".")) < page.index(in_a_clone(FROM_PYPI))
    assert f"\nVLLM_VERSION := {VLLM}\n" in (ROOT / "Makefile").read_text()


@pytest.mark.slow
def test_vllm_takes_the_arguments_of_the_manifests():
    """No cluster is asked. `vllm serve` and Ray Serve read the same arguments; tests/serve/test_server.py runs them."""
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    compose, kserve, ray = manifests()
    (service,) = compose["services"].values()
    predictor = kserve["spec"]["predictor"]
    (container,) = predictor["containers"]
    assert service["command"] == container["args"]
    for file, entry in (("cpu", "vllm/vllm-openai-cpu:"), ("cuda", "vllm/vllm-openai:")):  # whose entry is `vllm serve`
        image = (ROOT / "packaging" / f"Dockerfile.{file}").read_text()
        assert f"\nFROM {entry}v" in image and "ENTRYPOINT" not in image
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(container["args"])
    assert arguments.port == container["ports"][0]["containerPort"] == container["readinessProbe"]["httpGet"]["port"]
    assert service["ports"] == [f"{arguments.port}:{arguments.port}"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(Path(arguments.model_tag).parent) == mounted[predictor["volumes"][0]["name"]]
    assert service["volumes"] == [f".:{Path(arguments.model_tag).parent}"]
    assert container["env"] == [{"name": name, "value": value} for name, value in service["environment"].items()]
    (model,) = ray["applications"][0]["args"]["llm_configs"]
    engine = AsyncEngineArgs(model=model["model_loading_config"]["model_source"], **model["engine_kwargs"])
    assert engine.max_model_len == arguments.max_model_len
