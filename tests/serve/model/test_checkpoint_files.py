"""What is read before the weights, from a folder and from a stand-in for the hub."""

import contextlib
import json
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
import tiny
import torch
from checkpoint_folder import config_of
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config

from ria_vllm.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE
from ria_vllm.errors import RiaError
from ria_vllm.format.schema import PERMUTATIONS_FILE
from ria_vllm.serve.linear.method import Sparse24LinearMethod
from ria_vllm.serve.model.checkpoint_files import Offline, is_offline, locate
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.model.reload import check_first_load, check_reload


def test_missing_permutations(copy):
    (copy / PERMUTATIONS_FILE).unlink()
    with pytest.raises(RiaError, match="permutations.safetensors is missing"):
        config_of(copy)


def test_weights_of_another_run(checkpoint, copy, tmp_path):
    torch.manual_seed(3)
    tiny.write(tiny.FAMILIES["llama-gqa"], tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / SINGLE_FILE, copy / SINGLE_FILE)
    with pytest.raises(RiaError, match="its weights are not stored under the permutations that config.json names"):
        config_of(copy)


def test_damaged_permutation_is_named(copy):
    stored = load_file(copy / PERMUTATIONS_FILE)
    stored["model.layers.1.mlp.down_proj.input_permutation"][5] = 0
    save_file(stored, copy / PERMUTATIONS_FILE)
    with pytest.raises(RiaError, match=r"layers\.1\.mlp\.down_proj.*more than once|layers\.1\.mlp\.down_proj.*channel"):
        config_of(copy)


def split(folder, index=True):
    """Two shards in place of the single weight file; returns their paths."""
    with safe_open(folder / SINGLE_FILE, framework="pt") as file:
        metadata = file.metadata()
    stored = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    shards = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard, names in zip(shards, (list(stored)[::2], list(stored)[1::2])):
        save_file({name: stored[name] for name in names}, shard, metadata)
    if index:
        weight_map = {name: shard.name for shard in shards for name in load_file(shard)}
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return shards


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    """A model of the same sizes, in other channel orders."""
    folder = tmp_path_factory.mktemp("files of") / "another run"
    tiny.write(tiny.FAMILIES["llama-gqa"], folder, seed=1)
    return folder


def test_shards_without_an_index(checkpoint, copy):
    """What `hf download --include "*.safetensors" config.json` leaves. vLLM loads all of them, so all are read."""
    split(copy, index=False)
    config, whole = config_of(copy), config_of(checkpoint)
    assert config.pruned == whole.pruned and config.stored == whole.stored
    assert set(config.permutations) == set(whole.permutations)


def test_a_missing_shard_without_an_index(copy):
    split(copy, index=False)[1].unlink()
    with pytest.raises(RiaError, match="1 of the 2 files model-.*no model.safetensors.index.json. Get the others"):
        config_of(copy)


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_second_weight_file_without_an_index(checkpoint, copy, hub, other_run, place):
    """vLLM would load both, and the tensors of the second would replace those of the first."""
    config = config_of(checkpoint)

    def read():
        if place == "hub":
            hub.config()
        elif place == "reload":
            check_reload(config, SimpleNamespace(model=str(copy), revision=None), from_files=True)
        else:
            config_of(copy)

    shutil.copy(other_run / SINGLE_FILE, copy / "old.safetensors")
    with pytest.raises(RiaError, match="is in model.safetensors and in old.safetensors, and vLLM loads both"):
        read()
    save_file({"lm_head.bias": torch.zeros(8)}, copy / "old.safetensors")
    with pytest.raises(RiaError, match="old.safetensors: its weights are not stored under the permutations"):
        read()
    (copy / "old.safetensors").rename(copy / ".old.safetensors")  # vLLM does not see it
    (copy / "original").mkdir()
    shutil.copy(copy / ".old.safetensors", copy / "original" / "old.safetensors")
    read()


@pytest.mark.parametrize("name", ["consolidated.safetensors"])
@pytest.mark.parametrize("indexed", [True, False])
def test_what_vllm_itself_takes_for_weights_in_mistrals_format(copy, name, indexed):
    """The reason for the tests below: vLLM reads that file, and no other."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    split(copy, index=indexed)
    save_file({"norm.weight": torch.zeros(8)}, copy / name)
    _, files, *_ = DefaultModelLoader(LoadConfig())._prepare_weights(str(copy), None, None, False, None)
    assert files == [str(copy / name)]


@pytest.mark.parametrize("name", ["consolidated.safetensors", "sub/consolidated.safetensors"])
@pytest.mark.parametrize("indexed", [False])
@pytest.mark.parametrize("place", ["folder", "cache"])
def test_weights_in_mistrals_format_are_refused(checkpoint, copy, hub, monkeypatch, place, indexed, name):
    """vLLM would read only those, and ignore the index."""
    config = config_of(checkpoint)
    if indexed:
        split(copy)

    def read():
        if place == "reload":
            check_reload(config, SimpleNamespace(model=str(copy), revision=None), from_files=True)
        else:
            built = config_of(copy) if place == "folder" else hub.config()
            built.get_quant_method(a_linear(), "model.layers.0.mlp.down_proj")

    if place == "cache":
        hub.reachable = False
    hub.cached = {path.relative_to(copy).as_posix() for path in copy.rglob("*")} if place == "cache" else set()
    read()
    (copy / name).parent.mkdir(exist_ok=True)
    save_file({"norm.weight": torch.zeros(8)}, copy / name)
    hub.cached |= {name} if place == "cache" else set()
    for options in (contextlib.nullcontext(), loading("auto"), loading("mistral")):
        with options, pytest.raises(RiaError, match=f"{name} makes vLLM take this model for one in Mistral's own"):
            read()


def test_a_folder_without_weights_is_for_dummy_weights_only(copy):
    for shard in split(copy, index=True):
        shard.unlink()
    config = config_of(copy)
    with pytest.raises(RiaError, match="no weights here .*object store has to be served from a local copy"):
        config.get_quant_method(a_linear(), "model.layers.0.mlp.down_proj")
    with dummy_weights():
        assert isinstance(config.get_quant_method(a_linear(), "model.layers.0.mlp.down_proj"), Sparse24LinearMethod)


class Hub:
    """A stand-in for the hub: the repository who/what is a folder, and some of its files are in the cache."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.cached, self.reachable, self.revisions = folder, set(), True, set()
        self.refusal, self.headers = None, []
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.from_cache)
        monkeypatch.setattr(huggingface_hub, "parse_safetensors_file_metadata", self.header)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", self.list)

    def path(self, name):
        return self.folder / name

    def download(self, repo, name, revision=None):
        self.revisions.add(revision)
        assert name != SINGLE_FILE  # vLLM downloads the weights, to where its options say
        if name not in self.cached or not isinstance(self.refusal, LocalEntryNotFoundError):
            self.refuse()
        if name not in self.cached and not self.reachable:
            raise LocalEntryNotFoundError("offline")
        if not self.path(name).is_file():
            raise EntryNotFoundError("404")
        return str(self.path(name))

    def refuse(self):
        if self.refusal is not None:
            raise self.refusal

    def list(self, repo, revision=None):
        self.revisions.add(revision)
        self.refuse()
        if not self.reachable:
            raise ConnectionError("no route to host")
        return [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]

    def from_cache(self, repo, name, revision=None):
        self.revisions.add(revision)
        return str(self.path(name)) if name in self.cached else None

    def header(self, repo, name, revision=None):
        self.revisions.add(revision)
        self.headers.append(name)
        if not self.reachable:
            raise ConnectionError("no route to host")
        with safe_open(self.path(name), framework="pt") as file:
            return SimpleNamespace(tensors=dict.fromkeys(file.keys()), metadata=file.metadata())

    def config(self):
        stored = json.loads(self.path("config.json").read_text())["quantization_config"]
        config = RiaConfig.from_config(stored)
        config.maybe_update_config("who/what", revision="v2")
        return config


@pytest.fixture
def hub(monkeypatch, copy):
    return Hub(monkeypatch, copy)


def test_hub_repository_with_an_index(hub):
    names = list(load_file(hub.path(SINGLE_FILE)))
    hub.path(SINGLE_FILE).rename(hub.path("model-00001-of-00001.safetensors"))
    hub.path(INDEX_FILE).write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")})
    )
    assert len(hub.config().pruned) == 14
    hub.path(INDEX_FILE).write_text('{"weight_map": [1]}')
    with pytest.raises(RiaError, match="who/what: no usable weight_map"):
        hub.config()


def answer(status):
    """What the hub's library raises when the hub refuses something."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    kinds = {401: RepositoryNotFoundError, 403: GatedRepoError}
    request = SimpleNamespace(method="GET", url="https://hub", headers={})
    response = SimpleNamespace(status_code=status, headers={}, request=request, history=[])
    kind = kinds.get(status, HfHubHTTPError)
    return kind(f"{status} Client Error.\n\nAccess to model who/what is restricted.", response=response)


@pytest.mark.parametrize("step", ["index", "list"])
def test_what_the_hub_refuses_is_not_taken_from_the_cache(hub, monkeypatch, step):
    """The cache may have files of an older state of the repository."""
    hub.cached, hub.refusal = {SINGLE_FILE, PERMUTATIONS_FILE, "config.json"}, answer(403)
    if step == "list":
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", Mock(side_effect=EntryNotFoundError("404")))
    config = hub.config()
    with pytest.raises(RiaError, match="who/what: .*from the hub .*Access to model who/what is restricted"):
        config.get_quant_method(a_linear(), "model.layers.0.mlp.down_proj")


def test_a_hub_that_is_down_or_too_busy_is_not_needed_for_what_is_cached(hub):
    """The hub's own library takes cached files then, too."""
    hub.cached = {path.name for path in hub.folder.iterdir()}
    expected = hub.config().permutations
    error = LocalEntryNotFoundError("An error happened while trying to locate the file.")
    error.__cause__, hub.refusal = answer(503), error
    config = hub.config()
    assert config.unread is None and config.permutations.keys() == expected.keys()
    hub.cached = set()
    with pytest.raises(Offline, match="the hub cannot be reached"):
        locate("who/what", PERMUTATIONS_FILE, None)


@pytest.mark.parametrize(
    ("error", "offline"),
    [(ConnectionError("no route to host"), True), (answer(401), False), (answer(429), True)],
)
def test_what_being_offline_is(error, offline):
    assert is_offline(error) is offline
    missing = LocalEntryNotFoundError("not in the cache")
    missing.__cause__ = error
    assert is_offline(missing) is offline


@pytest.mark.parametrize("cached", [(), (PERMUTATIONS_FILE,)])
def test_hub_that_cannot_be_reached(hub, cached):
    hub.reachable, hub.cached = False, set(cached)
    config = hub.config()
    with pytest.raises(RiaError, match="who/what: .*Download the whole repository"):
        config.get_quant_method(a_linear(), "model.layers.0.mlp.down_proj")
    with dummy_weights():  # which need nothing from the hub
        assert isinstance(config.get_quant_method(a_linear(), "model.layers.0.mlp.down_proj"), Sparse24LinearMethod)


def first_load(config):
    check_first_load(config, SimpleNamespace(model="who/what", revision="v2"))


def test_a_push_between_the_configuration_and_the_first_load(hub):
    """vLLM downloads the weights of the new state, which may by now be in the cache."""
    config = hub.config()
    first_load(config)
    hub.path(PERMUTATIONS_FILE).unlink()  # those that the server holds count
    first_load(config)
    torch.manual_seed(3)
    tiny.write(tiny.FAMILIES["llama-gqa"], hub.folder, seed=1)
    hub.cached = set()
    with pytest.raises(RiaError, match="who/what: its weights are stored in other channel orders"):
        first_load(config)


def test_an_object_store(copy):
    """vLLM copies the small files of s3:// to a folder, but not the permutations. They must not be taken for absent."""
    for shard in split(copy):
        shard.unlink()
    (copy / PERMUTATIONS_FILE).unlink()
    config = config_of(copy)
    with pytest.raises(RiaError, match="object store has to be served from a local copy"):
        config.get_quant_method(a_linear(), "model.layers.0.mlp.down_proj")
    with pytest.raises(RiaError, match="s3://bucket/model: cannot get"):
        locate("s3://bucket/model", PERMUTATIONS_FILE, None)


def loading(load_format):
    """An engine with this `--load-format`."""
    return set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format=load_format)))


def dummy_weights():
    return loading("dummy")


def a_linear():
    from vllm.model_executor.layers.linear import LinearBase

    return object.__new__(LinearBase)
