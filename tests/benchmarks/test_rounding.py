"""`python -m benchmarks.rounding`: its table, and that it leaves `compress` as it was."""

from click.testing import CliRunner

from benchmarks.rounding import main
from ria_vllm.offline.run import layers
from ria_vllm.offline.sublayer.solve import solve


def test_each_part_lowers_the_error(tiny, text):
    arguments = [str(tiny("llama")), "--data", str(text), "--samples", "8", "--seq-len", "32"]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lines = [line.strip("| ").split(" | ") for line in done.output.splitlines()]
    assert lines[0][0] == "int4-g64" and lines[0][1:8] == [
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]
    mean = {line[0]: float(line[-1].rstrip("%")) for line in lines[2:]}
    largest, searched, _, one, three, six = mean.values()
    assert 0 < six <= three <= one < searched < largest
    assert layers.solve is solve
