"""A stand-in for compute-sanitizer."""

import os
import sys
import textwrap

import pytest

from benchmarks import gpu_sanitizer

SANITIZER = """\
    #!{python}
    import json, os, subprocess, sys, time
    options = dict(zip(sys.argv[1:], sys.argv[2:]))
    if "--help" in sys.argv:
        print("--check-tensor-ops arg (=no)\\n--initcheck-track-filtered-global-memory arg (=yes)")
        sys.exit()
    say = lambda **row: print(json.dumps(row), flush=True)
    log = open(options["--log-file"], "w")
    print("========= COMPUTE-SANITIZER", file=log)
    if sys.argv[-2] == "-c":
        print("========= ERROR SUMMARY: 0 errors", file=log)
        sys.exit()
    {body}
"""


@pytest.fixture
def sanitizer(monkeypatch, tmp_path):
    """Puts a stand-in for compute-sanitizer on the PATH, whose Python code is given."""

    def put(body):
        path = tmp_path / "bin" / "compute-sanitizer"
        path.parent.mkdir(exist_ok=True)
        indented = textwrap.dedent(body).replace("\n", "\n    ")
        path.write_text(textwrap.dedent(SANITIZER.format(python=sys.executable, body=indented)))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
        gpu_sanitizer._usage.cache_clear()

    return put
