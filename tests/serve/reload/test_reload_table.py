"""Every way to load weights into a running server, against a server that was started with them.

The oracle: after any sequence of loads, the logits are those of a fresh server of the weights that should be there; or
the server has refused, and the logits are those of before. One that has no weights, because it was started with dummies
or has slept at level 2, gets them by whole loads only, and computes nothing after another one.
"""

from copy import copy
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reload_model import FOREIGN, FORMATS, Checkpoint, Foreign
from reload_server import HERE, Server, Sleeper, watch
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import reload as vllm_reload

from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels import registry
from ria_vllm.serve.kernels.reference_experts import ReferenceExpertsKernel
from ria_vllm.serve.reload.layerwise import _reason_against_reloads


@pytest.fixture(autouse=True)
def watched(ranks, monkeypatch):
    watch(monkeypatch)


def of(tensors, *starts):
    """The tensors whose names begin so."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(tuple(starts))}


def whole(change):
    """(change, what is expected then), with the tensors of training 2."""
    return change, lambda old, new: new


def part(*starts, pieces=1):
    """The same for a sync of tensors whose names begin so, in any order."""
    return (
        lambda server, new: server.sync(of(new, *starts), pieces, shuffled=True),
        lambda old, new: old | of(new, *starts),
    )


def sync_twice_then_files(server, new):
    server.sync(server.checkpoint.tensors(3))
    server.sync(new, 3)
    server.reload(2)


# What is done with a server of training 1, and what it must have then.
SEQUENCES = {
    "reload: the same files": (lambda server, new: server.reload(1), lambda old, new: old),
    "reload: files of other weights that are stored alike": whole(lambda server, new: server.reload(2)),
    "two reloads in a row": whole(lambda server, new: (server.reload(3), server.reload(2))),
    "sent: all weights at once": whole(lambda server, new: server.sync(new)),
    "sent: all weights in pieces": whole(lambda server, new: server.sync(new, 5)),
    "sent: all weights in pieces, in any order": whole(lambda server, new: server.sync(new, 7, shuffled=True)),
    "sent twice, then a reload": whole(sync_twice_then_files),
    "sent: all tensors of a pruned layer": part("model.block.down."),
    "sent: all tensors of pruned linears that vLLM fuses into a layer": part(
        "model.block.gate.", "model.block.up.", pieces=2
    ),
    "sent: all tensors of a dense layer": part("model.block.o."),
    "sent: the weight of a dense layer without its bias, which stays": part(
        "model.block.o.weight", "model.block.o.integers"
    ),
    "sent: all tensors of dense linears that vLLM fuses into a layer": part(
        "model.block.q.", "model.block.k.", pieces=3
    ),
    "sent: the embedding, to which the head may be tied": part("model.embed."),
    "sent: the head": part("model.head."),
    "sent: all experts of a layer": part("model.moe.", pieces=3),
    "sent: all tensors of a norm, or of a Mamba layer that is no linear": part(
        "model.scan.", "model.norm.", "model.mixer.", "model.router."
    ),
}


def sent(*names):
    return lambda server, new: server.sync({name: new[name] for name in names})


def scales_of_the_cache(server, new):
    new = new | {"model.block.attn.k_scale": torch.ones(())}
    with pytest.raises(RiaError, match="KV cache"):
        server.load(server.files(new.items()))
    server.sync(new)


def left_in_the_middle(server, new):
    """A trainer that goes away. The next one begins."""
    vllm_reload.initialize_layerwise_reload(server.model)
    server.model.load_weights([(name, tensor.clone()) for name, tensor in new.items()][:9])
    raise RiaError("the trainer is gone")


def wrong_in_the_middle(server, new):
    """After some layers."""
    wrong = next(name for name in new if name.startswith("model.moe.0.experts.2.w2"))
    server.sync(new | {wrong: torch.zeros(3, 3)}, 4)


def without(*names):
    return lambda server, new: server.sync({name: one for name, one in new.items() if name not in names})


# Those for which a server needs none of its own weights.
WHOLE = [name for name in SEQUENCES if not name.startswith("sent: ") or name.startswith("sent: all weights")]


def outside(server, new):
    Server.refuses = True
    try:
        server.reload(2)
    finally:
        Server.refuses = False


UNKNOWN = "sent: a name that the model does not have"
AGAIN = "a trainer that goes away: the next sync begins anew"
# What a server must refuse.
REFUSED = {
    "reload: files of another model, of other linears or of other permutations": outside,
    "sent: a dense weight for a pruned linear": lambda server, new: server.sync(
        of(new, "model.block.o.") | {"model.block.down.weight": torch.zeros(128, 128)}
    ),
    "sent: a tensor of another shape, after layers that are new already": wrong_in_the_middle,
    UNKNOWN: lambda server, new: server.sync(of(new, "model.block.o.") | {"model.who.weight": torch.ones(3)}),
    "sent: the bias of a pruned layer without its weight": sent("model.block.down.bias"),
    "sent: the bias of a dense layer without its weight": sent("model.block.o.bias"),
    "sent: one of the biases of a fused layer": sent("model.block.q.bias"),
    "sent: one of the dense linears of a fused layer": lambda server, new: server.sync(of(new, "model.block.q.")),
    "sent: one tensor twice": lambda server, new: server.load(
        list(new.items()), [("model.norm.weight", torch.zeros(128))]
    ),
    "sent: one of the pruned linears of a fused layer": lambda server, new: server.sync(of(new, "model.block.gate.")),
    "sent: one tensor of a Mamba layer that is no linear": sent("model.scan.A"),
    "sent: some experts of a layer": lambda server, new: server.sync(of(new, "model.moe.0.experts.1.")),
    "scales of an fp8 KV cache, sent or in the files of a reload": scales_of_the_cache,
    AGAIN: left_in_the_middle,
    "reload: files without the head, or without the embedding": lambda server, new: server.reload(
        2, **dict.fromkeys(of(server.checkpoint.tensors(2), server.checkpoint.head))
    ),
}

# How it is stored, and what the server is started with.
CHECKPOINTS = [
    ("float", "pruned", "untied", "weights"),
    ("float", "pruned", "tied", "dummies"),
    ("float", "dense", "tied", "weights"),
    ("int4", "dense", "untied", "dummies"),
    ("float", "served dense", "untied", "weights"),
    ("int8", "pruned", "tied", "weights"),
    ("bfloat16", "dense", "tied", "weights"),
    ("int4-g32", "served dense", "untied", "weights"),
]
# Other forms of the same weights, with what could go wrong otherwise in them.
OTHER_FORMS = [
    ("fp8", "pruned", "untied", "weights"),
    ("int8-g64", "pruned", "untied", "dummies"),
    ("W8A16", "pruned", "tied", "dummies"),
    ("W4A16", "served dense", "untied", "weights"),
    ("int8 in 8:16", "pruned", "tied", "weights"),
    ("dense linears in int8", "dense", "untied", "dummies"),
    ("compressed-tensors", "dense", "tied", "dummies"),
    ("compressed-tensors, fp8 by tensor", "dense", "untied", "weights"),
    ("compressed-tensors, int8 with zeros", "dense", "tied", "dummies"),
    ("compressed-tensors, int8-g64", "dense", "untied", "dummies"),
    ("pack-quantized", "dense", "untied", "dummies"),
    ("marlin-24", "dense", "untied", "dummies"),
]
OF_FORMS = {
    "reload: files of other weights that are stored alike",
    "sent: all weights in pieces, in any order",
    "sent twice, then a reload",
    "sent: all tensors of a pruned layer",
    "sent: all tensors of pruned linears that vLLM fuses into a layer",
    "sent: all tensors of a dense layer",
    "sent: the weight of a dense layer without its bias, which stays",
    "sent: a dense weight for a pruned linear",
    "sent: a tensor of another shape, after layers that are new already",
    "sent: the bias of a pruned layer without its weight",
    "sent: one of the dense linears of a fused layer",
    "sent: one of the pruned linears of a fused layer",
    AGAIN,
}


def tried(names):
    """Each of a table's names with servers of its own."""
    cases = [*product(CHECKPOINTS, names), *product(OTHER_FORMS, [name for name in names if name in OF_FORMS])]
    return pytest.mark.parametrize(
        ("server", "name"), cases, indirect=["server"], ids=[f"{', '.join(how)}-{name}" for how, name in cases]
    )


@pytest.fixture
def server(request, monkeypatch):
    """A server with the weights of training 1. One of dummies gets them as a trainer would send them."""
    form, experts, head, start = request.param
    if experts == "served dense":
        monkeypatch.setattr(registry, "EXPERTS_KERNELS", (ReferenceExpertsKernel,))
    if form in FOREIGN:
        checkpoint = Foreign(form, head == "tied")
    else:
        checkpoint = Checkpoint(FORMATS[form], experts != "dense", head == "tied")
    if start == "weights":
        return Server.started(checkpoint, 1, monkeypatch)
    server = Server.started(checkpoint, None, monkeypatch)
    server.sync(checkpoint.tensors(1), 3)
    return server


def fresh(server, tensors, monkeypatch):
    """The logits of a server that was started with these tensors."""
    checkpoint = copy(server.checkpoint)
    checkpoint.tensors = lambda training: tensors
    return Server.started(checkpoint, 0, monkeypatch).logits()


def check(server, expected, monkeypatch):
    torch.testing.assert_close(server.logits(), fresh(server, expected, monkeypatch), rtol=0, atol=0)


def check_sequence(server, name, monkeypatch):
    change, expected = SEQUENCES[name]
    old, new = (server.checkpoint.tensors(training) for training in (1, 2))
    change(server, new)
    check(server, expected(old, new), monkeypatch)


def check_refused(server, refused, name, monkeypatch):
    """Whatever failed, the next whole sync brings it all."""
    new, before = server.checkpoint.tensors(2), server.logits()
    before = None if server.model.ria_reloads.lacks_weights else before
    with pytest.raises(ValueError if name == UNKNOWN else RiaError):  # of a name vLLM says it
        refused[name](server, new)
    after = server.logits()
    assert after is before is None or torch.equal(after, before)
    server.sync(new, 4, shuffled=True)
    check(server, new, monkeypatch)


@tried(SEQUENCES)
def test_a_server_has_the_weights_that_should_be_there(server, monkeypatch, name):
    check_sequence(server, name, monkeypatch)


@tried(REFUSED)
def test_what_is_refused_changes_nothing(server, monkeypatch, name):
    before = server.logits()
    check_refused(server, REFUSED, name, monkeypatch)
    server.reload(1)
    torch.testing.assert_close(server.logits(), before, rtol=0, atol=0)


def test_a_tensor_that_has_two_names_does_not_stand_for_another(monkeypatch):
    """vLLM's mappers may make one of them. Without this, rows of k would be memory that nobody has written."""
    server = Server.started(Checkpoint(), 1, monkeypatch)
    before, q = server.logits(), of(server.checkpoint.tensors(2), "model.block.q.")
    with pytest.raises(RiaError, match="16384 of the 32768 numbers in its weight came"):
        server.sync(q | {name.removeprefix("model."): tensor for name, tensor in q.items()})
    assert torch.equal(server.logits(), before)


# A part of what a server without weights needs.
PARTS = {name: SEQUENCES[name][0] for name in SEQUENCES if name not in WHOLE} | REFUSED | {
    "sent: all but a dense layer": without("model.block.o.weight", "model.block.o.bias"),
    "sent: all but the bias of a dense layer": without("model.block.o.bias"),
}  # fmt: skip


TIED = [("dummies", "int8", "pruned", "tied"), ("sleep level 2", "float", "dense", "tied")]
UNTIED = [("dummies", "float", "dense", "untied"), ("sleep level 2", "int4", "served dense", "untied")]


@pytest.fixture(params=TIED, ids=", ".join)
def empty(request, monkeypatch):
    """A server without weights."""
    start, form, experts, head = request.param
    if experts == "served dense":
        monkeypatch.setattr(registry, "EXPERTS_KERNELS", (ReferenceExpertsKernel,))
    checkpoint = Checkpoint(FORMATS[form], experts != "dense", head == "tied")
    server = Server.started(checkpoint, None if start == "dummies" else 1, monkeypatch)
    if start != "dummies":
        server.sleep()
    return server


@pytest.mark.parametrize("empty", TIED + UNTIED, indirect=True, ids=", ".join)
@pytest.mark.parametrize("name", WHOLE)
def test_whole_loads_give_a_server_its_first_weights(empty, monkeypatch, name):
    check_sequence(empty, name, monkeypatch)


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_model_are_refused_where_nothing_else_is(empty, monkeypatch, name):
    check_refused(empty, PARTS, name, monkeypatch)


@pytest.mark.parametrize("sleeps", [False, True])
def test_a_server_that_computes_or_sleeps_in_the_middle_of_a_reload_has_refused_it(monkeypatch, sleeps):
    server = Server.started(Checkpoint(FORMATS["int8"], True, tied=True), 1, monkeypatch)
    new, before = list(server.checkpoint.tensors(2).items()), server.logits()
    vllm_reload.initialize_layerwise_reload(server.model)
    server.model.load_weights(new[:40])
    if sleeps:
        server.sleep()
    else:
        assert torch.equal(server.logits(), before)
    with pytest.raises(RiaError, match="after one that was refused"):
        server.model.load_weights(new[40:])
    with pytest.raises(RiaError, match="this reload was refused"):
        vllm_reload.finalize_layerwise_reload(server.model, HERE)
    after = server.logits()
    assert after is None if sleeps else torch.equal(after, before)
    server.reload(2)
    check(server, server.checkpoint.tensors(2), monkeypatch)


def test_latent_attention_that_is_packed_for_amx_is_not_reloaded(monkeypatch):
    """vLLM's attention has emptied the weight of kv_b_proj then."""
    server = Server.started(Checkpoint(FORMATS["float"], True), 1, monkeypatch)
    before, server.model.norm.is_amx_bmm_enabled = server.logits(), True
    with pytest.raises(RiaError, match="cannot reload latent attention"):
        server.reload(2)
    assert torch.equal(server.logits(), before)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"parallel_config": SimpleNamespace(data_parallel_size=2)}, "engines share the experts"),
        ({"weight_transfer_config": SimpleNamespace(backend="sharded_rdt")}, "not for models that ria-vllm serves"),
    ],
    ids=["data parallel", "sharded_rdt"],
)
def test_what_could_leave_weights_of_two_models_is_not_begun(given, words, monkeypatch):
    server = Server.started(Checkpoint(FORMATS["float"], True), 1, monkeypatch)
    alone = {"parallel_config": SimpleNamespace(data_parallel_size=1), "weight_transfer_config": None}
    config = SimpleNamespace(model_config=SimpleNamespace(is_moe=True), **(alone | given))
    server.model.ria_reloads._refused = _reason_against_reloads(config)
    before = server.logits()
    with pytest.raises(RiaError, match=words):
        server.reload(2)
    assert torch.equal(server.logits(), before)
    assert _reason_against_reloads(SimpleNamespace(model_config=None, **alone)) is None


def test_a_worker_names_the_files_that_are_served(monkeypatch):
    server = Server.started(Checkpoint(FORMATS["float"], True), 1, monkeypatch)
    worker, before = Sleeper(server.model), server.logits()
    worker.model_config.model = "first"
    monkeypatch.setattr(Server, "refuses", True)
    with pytest.raises(RiaError, match="not the files of the start"):
        worker.reload_weights(server, "second")
    assert worker.model_config.model == "first"
    monkeypatch.setattr(Server, "refuses", False)
    with pytest.raises(RiaError, match="takes weights as a folder has them"):
        worker.reload_weights(server, "packed", is_checkpoint_format=False)
    assert torch.equal(server.logits(), before)
    worker.reload_weights(server, "second")
    assert worker.model_config.model == "second"


def test_the_docs_have_this_table():
    """After each name, whether a server then has these weights, or has refused them; the same of one without any."""
    rows = [f"| {name} | yes | {'yes' if name in WHOLE else 'refused'} |" for name in SEQUENCES]
    rows += [f"| {name} | refused | refused |" for name in REFUSED]
    page = (Path(__file__).parents[3] / "docs/troubleshooting.md").read_text()
    first = page[: page.index(rows[0])].splitlines()[-1]
    table = page[page.index(rows[0]) :].partition("\n\n")[0]
    assert table == "\n".join(rows) and set(first) == set("| -"), "\n".join(rows)


def test_heads_are_packed_by_vllm_as_these_tests_assume():
    """Else tied heads prove nothing here."""
    layer = torch.nn.Linear(128, 96, bias=False)
    UnquantizedEmbeddingMethod().process_weights_after_loading(layer)
    assert layer.cpu_linear is not torch.nn.functional.linear
