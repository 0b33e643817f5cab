"""Layers that prove themselves: nothing that is right is refused, and whatever goes wrong on the way is named.

The proofs of these tests are made by the formula, from the plain matrices.
"""

import pytest
import torch
from proved_model import FORMATS, INNER, Checkpoint
from proved_server import Server, watch

from ria_vllm.checkpoint.folding import RowPermutation
from ria_vllm.errors import RiaError
from ria_vllm.format import proofs
from ria_vllm.serve.linear import packing
from ria_vllm.serve.load.loading import LayerLoader
from ria_vllm.serve.proving import proved

ALL = 3 + 3 * 4 + 6  # gate, up, down; twelve of experts; q, k, o, embedding, head, a convolution


@pytest.fixture(autouse=True)
def watched(ranks, monkeypatch):
    watch(monkeypatch)


@pytest.fixture
def started(monkeypatch, caplog):
    """Starts a server of a checkpoint and returns it with what the log says of proofs."""
    caplog.set_level("INFO", logger="vllm.ria")

    def start(weight_format="float", tied=False, training=1):
        checkpoint = Checkpoint(FORMATS[weight_format], pruned_experts=True, tied=tied)
        return Server.started(checkpoint, training, monkeypatch)

    return start


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_server_proves_all_of_its_matrices(started, caplog, weight_format, tied):
    """A tied head has the embedding's proof. In int8 both are one layer."""
    server = started(weight_format, tied)
    count = ALL - (tied and "model.embed" in server.checkpoint.in_int8)
    assert f"{count} matrices compute what the checkpoint says" in caplog.text
    assert "without a proof" not in caplog.text


def test_a_folder_without_proofs_is_served(started, caplog, monkeypatch):
    schema = Checkpoint.schema
    monkeypatch.setattr(Checkpoint, "schema", lambda self: schema(self).model_copy(update={"proofs": None}))
    monkeypatch.setattr(Checkpoint, "proofs", lambda *_: {})
    server = started()
    assert "0 matrices compute what the checkpoint says (" in caplog.text
    assert f"without a proof: {ALL}, the first of which are " in caplog.text
    assert server.logits() is not None


def test_proofs_can_be_turned_off(started, caplog, monkeypatch):
    monkeypatch.setenv("RIA_VLLM_PROOF", "0")
    started()
    assert "matrices compute" not in caplog.text
    monkeypatch.setenv("RIA_VLLM_PROOF", "off")
    with pytest.raises(RiaError, match="RIA_VLLM_PROOF=off: set it to 0"):
        started()


def changes_weights(monkeypatch):
    """A model that rearranges the rows of its linears and scales its head."""
    config = Checkpoint.config

    def changing(self):
        found = config(self)
        found.rearranged = found.scales_head = True
        return found

    monkeypatch.setattr(Checkpoint, "config", changing)


def test_what_a_model_changes_as_it_loads_is_proved_from_there_on(started, caplog, monkeypatch):
    changes_weights(monkeypatch)
    started()
    assert f"{ALL - 5} matrices compute" in caplog.text
    assert "without a proof: 4, the first of which are " in caplog.text
    assert "of these, 3 layers compute what was loaded into them" in caplog.text


def wrong_kernel(monkeypatch):
    """It loses a row."""
    pack = packing.choose_and_pack

    def choose_and_pack(weights, *arguments):
        choice, packed = pack(weights, *arguments)
        if weights.out_features == 128:
            packed = tuple(tensor.clone() for tensor in packed)
            packed[0].view(torch.uint8).flatten()[-64:] = 1
        return choice, packed

    monkeypatch.setattr(packing, "choose_and_pack", choose_and_pack)


def wrong_rows(monkeypatch):
    """The permutation of another fold."""
    take = RowPermutation.take
    monkeypatch.setattr(RowPermutation, "take", lambda self, tensor: take(self, tensor).roll(1, 0))
    send = LayerLoader.wrap
    monkeypatch.setattr(
        LayerLoader, "wrap", lambda self, part, loader: loader if part == "proof" else send(self, part, loader)
    )


def wrong_columns(monkeypatch):
    """A kernel that gathers its input by the reversed permutation."""
    local = packing.local_permutation

    def local_permutation(permutation, layer, columns):
        p, crosses = local(permutation, layer, columns)
        return None if p is None else p[::-1].copy(), crosses

    monkeypatch.setattr(packing, "local_permutation", local_permutation)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (wrong_kernel, r"model\.block\.down .*: \d+ of its 128 rows are not what the checkpoint says"),
        (wrong_rows, r"model\.block\.gate, model\.block\.up "),
        (wrong_columns, r"model\.block\.gate, model\.block\.up "),
    ],
)
def test_what_goes_wrong_on_the_way_is_named(started, monkeypatch, damage, named):
    damage(monkeypatch)
    with pytest.raises(RiaError, match=f"^the folder: {named}"):
        started()


def changed(name, change):
    """Of tensors whose names begin so, or in any of several ways."""
    return lambda tensors: {key: change(one) if key.startswith(name) else one for key, one in tensors.items()}


def swapped(one, other):
    """Each has the other's tensors."""

    def change(tensors):
        found = {key.replace(one, other): tensor for key, tensor in tensors.items() if key.startswith(one)}
        found |= {key.replace(other, one): tensor for key, tensor in tensors.items() if key.startswith(other)}
        return {key: found.get(key, tensor) for key, tensor in tensors.items()}

    return change


def rows(tensor):
    return tensor.roll(1, 0)


def shard(tensor):
    return tensor.roll(len(tensor) // 2, 0)


def columns(tensor):
    return tensor.roll(8, 1)


# What may be wrong with weights, wherever on their way -> what is done to the files, and what the error says.
BUGS = {
    "rows in another order": (changed("model.block.up.compressed", rows), r"model\.block\.gate, model\.block\.up"),
    "rows of another shard": (changed("model.block.q.weight", shard), r"model\.block\.q, model\.block\.k"),
    "rows of another shard, scales too": (
        changed("model.block.down.weight_scale", shard), r"model\.block\.down .* 12\d of its 128 rows",
    ),
    "columns in another order": (changed("model.block.down.compressed", columns), r"model\.block\.down "),
    "columns of a dense layer": (changed("model.block.o.weight", columns), r"model\.block\.o "),
    "another mask": (changed("model.block.gate.bitmask", rows), r"model\.block\.gate, model\.block\.up"),
    "a wrong scale": (changed("model.block.down.weight_scale", lambda one: one * 1.001), r"model\.block\.down "),
    "gate and up swapped": (swapped("model.block.gate.", "model.block.up."), r"model\.block\.gate, model\.block\.up "),
    "q and k swapped": (swapped("model.block.q.", "model.block.k."), r"model\.block\.q, model\.block\.k "),
    "the rows of q in the place of those of k": (
        lambda tensors: tensors | {"model.block.k.weight": tensors["model.block.q.weight"]},
        r"model\.block\.q, model\.block\.k .* 128 of its 256 rows",
    ),
    "rows of the head in another order": (changed("model.head.", rows), r"model\.head"),
    "one weight of the head": (
        changed("model.head.integers", lambda one: one.index_put((torch.tensor(3), torch.tensor(5)), ~one[3, 5])),
        r"model\.head .* 1 of its 128 rows",
    ),
    "one row of the embedding": (
        changed("model.embed.weight", lambda one: torch.cat([one[:70], one[:1], one[71:]])),
        r"model\.embed .* 1 of its 128 rows",
    ),
    "an expert's rows": (
        changed("model.moe.0.experts.2.w2.compressed", rows),
        r"model\.moe\.0\.experts.* 1 of 4 experts, the first of which is 2",
    ),
    "two experts swapped": (
        swapped("model.moe.0.experts.1.", "model.moe.0.experts.3."),
        r"model\.moe\.0\.experts.* 2 of 4 experts, the first of which is 1",
    ),
}  # fmt: skip


def damaging(monkeypatch, damage):
    """Files that are read hold other tensors than those that they were proved with."""
    files = Server.files

    def damaged(self, tensors):
        tensors = dict(tensors)
        stream = files(self, damage(tensors).items())
        Server.read = self.checkpoint, tensors
        return stream

    monkeypatch.setattr(Server, "files", damaged)


@pytest.mark.parametrize("bug", BUGS)
def test_weights_that_are_not_what_was_written_are_named(started, monkeypatch, bug):
    """Any dense or pruned matrix."""
    damage, named = BUGS[bug]
    monkeypatch.setattr("ria_vllm.serve.proving.proved.LOOKED_UP", 50)
    damaging(monkeypatch, damage)
    with pytest.raises(RiaError, match=f"^the folder: {named}"):
        started("int8")


# What a rank may have of another one -> what is done to the files, and what the error says. Ranks share out the columns
# of down, so that it has all rows.
OF_TWO_RANKS = {
    "rows of pruned linears": (changed(("model.block.gate.", "model.block.up."), shard),
                               r"model\.block\.gate, model\.block\.up .* 128 of its 128 rows"),
    "rows of dense linears": (changed(("model.block.q.", "model.block.k."), shard),
                              r"model\.block\.q, model\.block\.k .* 128 of its 128 rows"),
    "columns": (changed(("model.block.down.compressed", "model.block.down.bitmask"), lambda one: shard(one.T).T),
                r"model\.block\.down .* 128 of its 128 rows"),
}  # fmt: skip


def with_the_other(rank):
    """Adds to what this rank of two makes of `down` what the other one does, from the files that were read last."""

    def add(y):
        checkpoint, tensors = Server.read
        name, r = "model.block.down", checkpoint.schema().proof_vector(INNER)
        there = slice(0, INNER // 2) if rank else slice(INNER // 2, INNER)
        r = r[checkpoint.permutations[name]][there]
        return y + proofs.tokens_of(r, len(y)) @ checkpoint.decoded(name, tensors)[:, there].T

    return add


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("bug", OF_TWO_RANKS)
def test_a_rank_of_two_proves_its_shards(started, ranks, caplog, monkeypatch, bug, rank):
    ranks(rank, 2)
    monkeypatch.setattr(proved, "tensor_model_parallel_all_reduce", with_the_other(rank))
    damage, named = OF_TWO_RANKS[bug]
    started("int8")
    assert f"{ALL} matrices compute" in caplog.text and "without a proof" not in caplog.text
    damaging(monkeypatch, damage)
    with pytest.raises(RiaError, match=f"^the folder: {named}"):
        started("int8")
