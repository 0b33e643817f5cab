"""The options: which make sense, and the size of groups that fits a model."""

import itertools
import json

import pytest

from ria_vllm.errors import RiaError
from ria_vllm.format.pattern import PATTERNS
from ria_vllm.offline.recipe import Recipe

FP8 = {"weights": "fp8", "activations": "fp8"}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "best"}, "--method 'best'"),
        ({"weights": "int4-g64"}, "--weights 'int4-g64'"),
        ({"weights": "int4", "group_size": 16}, "--group-size 16"),
        ({"group_size": 64}, "--group-size: for integer weights only"),
        ({"activations": "int8"}, "no --scheme has float weights and int8 activations"),
        ({"smooth": 0.5, "weights": "int8"}, "--scheme W8A8"),
        ({"smooth": float("nan"), "weights": "int8", "activations": "int8"}, "--smooth nan"),
        ({"calibration": "a.txt", "self_written": 1.0}, "--self-written 1.0"),
        ({"calibration": "a.txt", "self_written": 0.001}, "--self-written 0.001"),
        ({"self_written": 0.5}, "--self-written"),
        ({"ignore": ("[",)}, r"--ignore '\['"),
        (FP8 | {"pattern": PATTERNS["8:16"]}, "--pattern 8:16 is for CPUs.*give another scheme"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(RiaError, match=words):
        Recipe.of_options(options)


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({"calibration": "self"}, {"self_written": 0.0}),
        ({"calibration": "/mine/a.txt"}, {}),
        ({"reconstruct": "none"}, {"eval_text": None}),
        ({"reconstruct": "block"}, {}),
    ],
    ids=str,
)
def test_a_saved_recipe_loses_only_what_does_not_go_together_with_what_is_given(given, changed, tmp_path):
    path, recipe = tmp_path / "ria_report.json", Recipe(calibration="a.txt", self_written=0.5, eval_text="b.txt")
    path.write_text(json.dumps({"recipe": recipe.dump("model")}))
    again = Recipe.of_options(Recipe.saved(path, given) | given)
    wanted = {"self_written": 0.5, "eval_text": "b.txt"} | changed
    assert {name: getattr(again, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    "widths, size",
    [
        ((4096, 14336), 128),  # Llama 3 8B on 8 ranks
        ((4096, 11008), 64),  # Llama 2 7B: 43 groups on each of 4, where 128 fits 2
        ((3584, 18944), 64),  # Qwen2.5 7B on 8, where 128 fits 4
        ((896, 4864), 64),  # Qwen2.5 0.5B on 2, where 128 fits 1
        ((384, 576), 64),  # on 1
        ((64,), 64),
    ],
    ids=str,
)
def test_the_default_group_size_lets_ranks_have_whole_groups(widths, size):
    widths = {f"model.layers.0.{number}": width for number, width in enumerate(widths)}
    assert Recipe(weights="int4").fitting(widths).group_size == size
    assert Recipe(weights="int8").fitting(widths).group_size is None
    assert Recipe(weights="int4", group_size=32).fitting(widths).group_size == 32


def test_a_group_size_that_does_not_fit_is_refused_by_name():
    with pytest.raises(RiaError, match=r"--group-size 128: a\.down .*32, 64 or row"):
        Recipe(weights="int8", group_size=128).fitting({"a.q": 1024, "a.down": 192})


def test_scales_migrate_by_default_where_inputs_are_rounded():
    rounded = {"weights": "int8", "activations": "int8"}
    assert Recipe(**rounded).migration_strength == Recipe(**rounded).dump("x")["smooth"] == 0.5
    assert Recipe(**rounded, smooth=0.0).dump("x")["smooth"] == 0
    assert Recipe(weights="int4", activations="int8").migration_strength == 0
    assert Recipe(weights="int8").migration_strength == 0


@pytest.mark.parametrize(
    ("samples", "seq_len", "held_out"),
    [(128, 2048, 16), (32, 512, 4), (9, 512, 2), (8, 512, 2), (1, 2048, 1), (4, 32, 4)],
)
def test_an_eighth_is_held_out_but_at_least_1024_tokens_or_as_many_as_are_fitted_to(samples, seq_len, held_out):
    assert Recipe(samples=samples, seq_len=seq_len).held_out == held_out


@pytest.mark.parametrize(
    ("reconstruct", "seq_len", "chunks", "passes"),
    [
        ("short", 2048, 1, 8), ("short", 2048, 8, 6), ("short", 2048, 24, 2), ("short", 512, 8, 6),
        ("short", 4096, 8, 3),
        ("block", 2048, 8, 8), ("block", 2048, 32, 4), ("block", 2048, 128, 2), ("block", 512, 64, 4),
    ],
)  # fmt: skip
def test_training_reads_as_many_tokens_as_asked_for_in_two_to_eight_passes(reconstruct, seq_len, chunks, passes):
    assert Recipe(reconstruct=reconstruct, seq_len=seq_len).schedule.passes(chunks) == passes


def test_training_starts_nearer_to_the_dense_weights_where_tokens_are_few():
    for reconstruct in ("short", "block"):
        tokens = [(4, 32), (16, 512), (32, 512), (64, 512), (128, 512), (128, 1024), (128, 2048)]
        found = [Recipe(reconstruct=reconstruct, samples=a, seq_len=b).damping for a, b in tokens]
        assert found == [2.0, 2.0, 1.0, 0.5, 0.25, 0.2, 0.2]
    assert Recipe(reconstruct="admm", samples=4, seq_len=32).damping == 0.2


@pytest.mark.parametrize(("seq_len", "chunks"), [(64, 1), (2048, 16), (8192, 17), (2048, 4096)])
def test_a_short_training_stays_short(chunks, seq_len):
    schedule, tokens = Recipe(reconstruct="short", seq_len=seq_len).schedule, max(2048, seq_len)
    read = schedule.chunks(chunks)
    assert read == sorted(set(read)) and 0 <= read[0] <= read[-1] < chunks
    assert 8 * 2048 <= len(read) * schedule.passes(len(read)) * tokens <= 96 * 1024
    assert max((b - a for a, b in itertools.pairwise(read)), default=0) <= -(-chunks // (48 * 1024 // tokens))
    assert Recipe(reconstruct="block", samples=128, seq_len=2048).schedule.chunks(chunks) == list(range(chunks))


@pytest.mark.parametrize(
    ("share", "tokens"), [(1.0, 48 * 2048), (0.5, 24 * 2048), (1 / 3, 16 * 2048), (0.01, 16 * 2048), (0.0, 16 * 2048)]
)
@pytest.mark.parametrize("chunks", [8, 64, 4096])
def test_a_short_training_has_fewer_steps_for_fewer_weights(chunks, share, tokens):
    schedule = Recipe(reconstruct="short").schedule
    read = schedule.chunks(chunks, share)
    assert len(read) * schedule.passes(len(read), share) * 2048 == tokens


def test_a_short_training_goes_less_far_in_fewer_steps():
    rates = [Recipe(reconstruct="short").schedule.rate(share) for share in (1.0, 0.75, 0.5, 1 / 3, 0.0)]
    assert rates == [1.0, 0.75, 0.5, 0.5, 0.5]
    block = Recipe(reconstruct="block", samples=128, seq_len=2048).schedule
    assert block.rate(0.1) == 1.0 and block.chunks(64, 0.1) == list(range(64)) and block.passes(64, 0.1) == 2


@pytest.mark.parametrize("weights", ["float", "int8", "int4"])
def test_what_trains_sublayers(weights):
    names = ("none", "admm", "short", "block")
    recipes = {name: Recipe(reconstruct=name, weights=weights) for name in names}
    assert {name for name, recipe in recipes.items() if recipe.trains} == {"short", "block"}


@pytest.mark.parametrize("reconstruct", ["none", "admm", "short", "block"])
def test_what_is_trained_is_rounded_last(reconstruct):
    recipe = Recipe(reconstruct=reconstruct, weights="int4", group_size=64, activations="int8", smooth=0.5)
    trained = reconstruct in ("short", "block")
    assert recipe.before_rounding == (Recipe(reconstruct=reconstruct) if trained else recipe)
