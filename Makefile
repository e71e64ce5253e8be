# Each target runs the set-up that it needs, so `make demo` or `make test` can be the first command.
STACK ?= onedl
VENV ?= $(if $(filter openmmlab,$(STACK)),.venv-openmmlab,.venv)
export STACK VENV
python = $(VENV)/bin/python

# One thread per process, because test processes with one thread per core each would slow each other
# down.
pytest = OMP_NUM_THREADS=1 $(python) -m pytest -n auto --maxprocesses 4 --dist worksteal

# The tests that depend on the stack: configs with a training step of each, backbones, training, demo.
stack_tests = tests/configs tests/backbones/test_backbones.py tests/tools/test_demo.py tests/tools/test_train.py

.PHONY: setup demo test test-all test-stack compile-kernels docs lint format clean

setup:
	tools/setup_env.sh

demo: setup
	$(python) tools/demo.py

test: setup
	$(pytest) -m 'not long'

test-all: setup
	$(pytest)
ifeq ($(STACK),onedl)
	$(MAKE) test-stack STACK=openmmlab VENV=.venv-openmmlab
endif

test-stack: setup
	$(pytest) -m 'not long' $(stack_tests)

# Compiles every kernel variant, without a GPU, and prints registers, spills and shared memory.
compile-kernels: setup
	$(python) tools/compile_kernels.py --all

# Builds the site of the documentation into build/site. Warnings, such as dead links, are errors.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict

lint: setup
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy
	$(python) -m codespell_lib

format: setup
	$(python) -m ruff check --fix
	$(python) -m ruff format

# Keeps the environments and the mmcv that was built (.venv*, .cache).
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
