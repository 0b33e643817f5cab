"""`plan`: what it says of a model is what `compress` then makes of it, and of one on the hub only headers are read."""

import re

import hub as stand_in
import pytest
from click.testing import CliRunner
from compressing import edited, run_small
from recovered import is_linear, save_recovered

from ria_vllm.checkpoint.inventory import take_inventory
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.format.pattern import PATTERNS, SCHEMES
from ria_vllm.offline.planning import plan
from ria_vllm.speed import EIGHT


def planned(*arguments: object) -> str:
    result = CliRunner().invoke(plan, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def size_in(said: str, before: str) -> float:
    number, unit = re.search(rf"{before}, ([0-9.]+) (.B)", said).groups()
    return float(number) * {"kB": 1e3, "MB": 1e6}[unit]


@pytest.mark.parametrize(
    ("family", "scheme"), [("opt", "BF16"), ("gemma3", "W8A8"), ("qwen3-moe", "W4A16"), ("opt", "FP8")]
)
def test_what_compress_then_does(family, scheme, tiny, text, tmp_path):
    said = planned(tiny(family), "--scheme", scheme)
    run_small(tiny(family), tmp_path / "out", text, **SCHEMES[scheme])
    made = take_inventory(Reader(tmp_path / "out"))
    plain = [entry for entry in made["linears"] if entry["experts"] is None]
    count, folded = map(int, re.search(r"pruned: +(\d+) linears.*permutations of (\d+) fold", said).groups())
    assert ("--pattern 8:16" in said) == (scheme != "FP8")
    assert (count, folded) == (len(plain), sum(entry["permutation"] == "folded" for entry in plain))
    assert ("and the experts of" in said) == (len(plain) < len(made["linears"]))
    assert made["dense_linears"] and f"dense:   {made['dense_linears'][0]}" in said
    # Orders and scales, which it leaves out, are much beside values as few as these.
    assert 0.95 < made["totals"]["bytes"] / size_in(said, scheme) < 1.2
    assert made["totals"]["dense_bytes"] == pytest.approx(size_in(said, "dense"), rel=0.02)
    times = re.findall(r"^ *(?:fast|default|best) +(\d+) s +(\d+) s +[0-9.]+ [MG]B", said, re.M)
    assert len(times) == 3 and all(0 < int(text) <= int(whole) for whole, text in times)


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    return save_recovered(tmp_path_factory.mktemp("recovered") / "dense")


@pytest.fixture
def hub(recovered, tmp_path, monkeypatch):
    """The model in several files."""
    with stand_in.running(stand_in.Hub()) as hub:
        monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        hub.branches["main"] = {path.name: path.read_bytes() for path in recovered.iterdir() if path.is_file()}
        yield hub


def test_of_a_hub_id_it_reads_headers_only(hub, recovered):
    folder, found = planned(recovered), planned("user/model")
    sizes = {name: len(content) for name, content in hub.branches["main"].items() if name.endswith(".safetensors")}
    assert hub.sent < 101_000 * len(sizes) + 20_000 < sum(sizes.values()) / 2
    for name in ("pruned:", "dense:", "kernel:", "result:"):
        lines = [
            [line.split(";")[0] for line in said.splitlines() if line.startswith(name)] for said in (folder, found)
        ]
        assert lines[0] and lines[0] == lines[1]
    assert size_in(found, "user/model") == size_in(folder, "dense") and "to fetch" in found and "to fetch" not in folder
    # Weights alone tell that it is 2:4 already, and has to be copied only.
    assert folder.count("that of copying") == 3 and "that of copying" not in found
    assert "do not tell" in found and "do not tell" not in folder


@pytest.fixture
def eight(tiny, tmp_path):
    """A model that is 8:16 already, and not 2:4."""

    def change(tensors):
        for name in filter(is_linear, tensors):
            tensors[name].view(-1, 16)[:, 8:] = 0

    return edited(tiny("llama"), tmp_path / "eight", change)


def test_of_a_model_of_a_wider_pattern_it_names_the_option_that_works(eight):
    with pytest.raises(RiaError, match=r"is 8:16 already.*--pattern 8:16 keeps"):
        planned(eight)
    assert planned(eight, "--pattern", "8:16").count("that of copying") == 3


def test_another_pattern_has_the_speed_that_compress_says(tiny, text, tmp_path, monkeypatch):
    """It is not promised 2:4's: what is said compares its linears with those of 2:4."""
    monkeypatch.setattr("ria_vllm.speed.served_by", lambda *_: ("cpu", "avx2"))
    for scheme in ("W8A8", "BF16"):
        options = SCHEMES[scheme] | {"pattern": PATTERNS["8:16"]}
        report, _ = run_small(tiny("llama"), tmp_path / scheme, text, **options)
        said = planned(tiny("llama"), "--scheme", scheme, "--pattern", "8:16")
        speed = re.search(r"^tokens/s (.*)", said, re.M)[1]
        least, most = EIGHT["avx2"][scheme == "BF16"]
        assert speed == f"linears at {least} to {most} times the speed of 2:4 with 1 to 8 users"
        assert report["verdict"]["speed"] == f"on this CPU, {speed}" and "--pattern" not in said


def test_names_that_lead_nowhere(hub, tmp_path):
    hub.branches["main"] = {"config.json": b"{}"}
    with pytest.raises(RiaError, match="user/model: .*the hub did not provide it"):
        planned("user/model")
    (tmp_path / "a.gguf").write_text("")
    with pytest.raises(RiaError, match="plan reads Hugging Face folders and hub ids"):
        planned(tmp_path / "a.gguf")
