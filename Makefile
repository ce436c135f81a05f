# SPDX-License-Identifier: Apache-2.0
# Every check has one target here; CI, pre-commit and CONTRIBUTING.md call these and nothing else.
#
# Without PYTHON= the targets make and use .venv. With PYTHON=/path/to/python they use that
# environment as it is: only moe_ops itself is installed into it, editable and without dependencies.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
# Environments and tests take all cores as they are; `make ci` runs the checks of one core side by side.
ifndef SIDE_BY_SIDE
.NOTPARALLEL:
endif

# Without a pin pip takes whatever torch is newest; TORCH_PIP_ARGS can name an index of CPU builds.
TORCH_VERSION := 2.13.0
TRANSFORMERS_VERSION := 5.17.0
TRANSFORMERS_NEWEST_VERSION := 5.24.0
PEFT_VERSION := 0.21.2
# Its models need these three alone. With all that it asks for come datasets and wandb.
TORCHTITAN := torchtitan==0.3.0 spmd_types==0.2.3 tyro==1.0.17 docstring-parser==0.18.0
TORCH_PIP_ARGS ?=
BOOTSTRAP_PYTHON ?= python3
VENV := .venv
VENV_NEWEST := .venv-newest
NEWEST := $(VENV_NEWEST)/.transformers-$(TRANSFORMERS_NEWEST_VERSION)
ARGS ?=

# The suite's parallelism is its workers: more threads, or a compile pool, in each of them would
# compete for the same cores. Caches of compiled graphs would hide a changed backward formula.
# Inductor need not try out the C++ compiler in each process, 7 s each: a test that compiles will tell.
WORKERS ?= 2
TEST_ENV := OMP_NUM_THREADS=1 TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
  TORCHINDUCTOR_VEC_ISA_OK=1
PYTEST = $(TEST_ENV) $(1) -m pytest -n $(WORKERS) --dist worksteal

# The GPU suite compiles kernels most of the time: its workers are there for the compiler.
GPU_WORKERS ?= 14

DEMO_MODULES := torch>=2.11 transformers>=5.17 yaml matplotlib tqdm
TEST_MODULES := torch>=2.11 transformers>=5.17 yaml pytest xdist hypothesis numpy

ifdef PYTHON
PY := $(PYTHON)
DEMO_ENV := demo-env
DEV_ENV := dev-env
else
PY := $(VENV)/bin/python
DEMO_ENV := $(VENV)/.demo
DEV_ENV := $(VENV)/.dev
endif

# Arguments: modules, each with an optional minimum version. One line for each that is missing.
define REQUIRE
import importlib.metadata, importlib.util, re, sys
def number(version):
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
bad = []
for argument in sys.argv[1:]:
    name, _, least = argument.partition(">=")
    if importlib.util.find_spec(name) is None:
        bad.append(f"cannot import {name}")
    elif least and number(have := importlib.metadata.version(name)) < number(least):
        bad.append(f"{name} is {have}, needs {least} or newer")
if sys.version_info < (3, 10):
    bad.append("Python is %d.%d, needs 3.10 or newer" % sys.version_info[:2])
sys.exit("".join(f"PYTHON={sys.executable}: {line}\n" for line in bad)[:-1] or None)
endef
export REQUIRE

# Exit status 0 if this Python's moe_ops is this checkout's.
define INSTALLED_HERE
import importlib.util, pathlib, sys
spec = importlib.util.find_spec("moe_ops")
here = pathlib.Path("src/moe_ops/__init__.py").resolve()
sys.exit(spec is None or pathlib.Path(spec.origin).resolve() != here)
endef
export INSTALLED_HERE

define PRINT_PTH
import sysconfig
print(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})")
endef
export PRINT_PTH

define WRITE_PAGES
import pathlib, sys
from moe_ops._core import reference, schema
reference.write_pages(schema.load_all(pathlib.Path("op_schemas")), pathlib.Path(sys.argv[1]))
endef
export WRITE_PAGES

# -n: each name that a page or a docstring links to exists, or conf.py says why not. -W: or it fails.
# -E -a: everything anew, for a page that is not read again does not repeat its warnings.
SPHINX = $(PY) -m sphinx -q -n -W --keep-going -E -a -b html -d build/site.doctrees docs build/site

##@ Use
.PHONY: help demo
help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} \
	  /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z-]+:.*## / {printf "  make %-26s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\n%s\n' "PYTHON=/path/to/python uses that environment instead of making $(VENV)." \
	  "ARGS='...' is handed on to the demo or to pytest."

demo: $(DEMO_ENV) ## Train a small Qwen3-MoE on real text, compiled, and show what was learned
	@$(PY) demo/train_qwen3_moe.py $(ARGS)

.PHONY: bench
bench: $(DEV_ENV) ## Benchmark the Triton kernels; needs a CUDA GPU
	$(PY) -m benchmarks.cuda $(ARGS)

.PHONY: bench-ep
bench-ep: $(DEV_ENV) ## Benchmark expert parallelism over the GPUs of this host; needs two
	$(PY) -m benchmarks.expert_parallel $(ARGS)

##@ Check
.PHONY: test test-fast test-interpreter test-gpu gpu-report-check test-transformers-newest lint format types imports docs docs-check site ci
test: $(DEV_ENV) ## Run the whole CPU test suite
	$(call PYTEST,$(PY)) $(ARGS)

test-fast: $(DEV_ENV) ## Run what is quick of the CPU test suite
	$(call PYTEST,$(PY)) -m "not slow and not gpu and not multi_gpu" $(ARGS)

# Both variables must be there before the first import of Triton.
test-interpreter: $(DEV_ENV) ## Run the Triton kernels in Triton's interpreter, without a GPU
	TRITON_INTERPRET=1 MOE_OPS_IMPLEMENTATION=triton $(call PYTEST,$(PY)) tests/interpreter $(ARGS)

# A complete run writes the report, to MOE_OPS_GPU_REPORT where that is set.
test-gpu: $(DEV_ENV) ## Run the GPU suite and write its report; needs a CUDA GPU
	MOE_OPS_GPU_REPORT="$${MOE_OPS_GPU_REPORT:-tests/gpu/report.json}" $(TEST_ENV) \
	  $(PY) -m pytest tests/gpu -n $(GPU_WORKERS) --dist worksteal --durations=10 \
	  -o faulthandler_timeout=240 $(ARGS)

gpu-report-check: $(DEV_ENV) ## Warn if the GPU suite was not run on the tree's code; fail if a test failed in it
	@$(PY) -m testing.gpu_report

test-transformers-newest: $(NEWEST) ## Run tests/integrations, layers and compat with the newest transformers
	$(call PYTEST,$(VENV_NEWEST)/bin/python) tests/integrations tests/layers tests/compat $(ARGS)

lint: $(DEV_ENV) ## Check style and formatting (ruff)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(DEV_ENV) ## Mend what ruff can mend
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(DEV_ENV) ## Check types (mypy)
	$(PY) -m mypy

imports: $(DEV_ENV) ## Check the import rules (import-linter)
	$(PY) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

docs: $(DEV_ENV) ## Write docs/ops/*.md from the op schemas, draw the picture, and build the site
	@$(PY) -c "$$WRITE_PAGES" docs/ops
	@$(PY) docs/picture.py
	@$(MAKE) --no-print-directory site

docs-check: $(DEV_ENV) ## Fail if docs/ops/*.md or the picture is not what `make docs` writes
	@pages=$$(mktemp -d); trap 'rm -rf "$$pages"' EXIT; $(PY) -c "$$WRITE_PAGES" "$$pages/ops"; \
	  $(PY) docs/picture.py "$$pages/token_order.svg"; \
	  diff -ru docs/ops "$$pages/ops" && diff -u docs/images/token_order.svg "$$pages/token_order.svg" \
	  || { echo "docs/ is not what op_schemas/ and docs/picture.py say: run 'make docs'"; exit 1; }

site: $(DEV_ENV) ## Build the documentation site in build/site; a warning fails it
	$(SPHINX)

# The checks of one core, and the second environment, beside each other. The suite and the warning
# about the GPU report come last: they stay on the screen.
ci: $(DEV_ENV) ## Run everything that CI runs
	@$(MAKE) --no-print-directory SIDE_BY_SIDE=1 -j 2 --output-sync=target \
	  types lint imports docs-check site $(NEWEST)
	@$(MAKE) --no-print-directory test-interpreter test-transformers-newest test gpu-report-check

##@ Release
.PHONY: release
release: docs-check ## Make VERSION=X.Y.Z: its schemas, wheel and sdist, checked; uploads nothing
	@$(PY) -m pytest -q tests/docs/test_readme_figures.py \
	  tests/benchmarks/test_report.py::test_the_pages_are_what_the_committed_results_give
	@$(PY) -m testing.gpu_report --strict
	@$(PY) -m testing.release "$(VERSION)"

##@ Environments
.PHONY: env clean distclean demo-env dev-env
env: $(DEV_ENV) ## Make the environment that the checks use

clean: ## Remove builds and caches
	rm -rf build dist src/*.egg-info runs
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src op_schemas testing tests demo examples benchmarks -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## Remove the environments too
	rm -rf $(VENV) $(VENV_NEWEST)

demo-env: MODULES := $(DEMO_MODULES)
dev-env: MODULES := $(TEST_MODULES)
demo-env dev-env:
	@$(PY) -c "$$REQUIRE" $(foreach module,$(MODULES),'$(module)')
	@$(PY) -c "$$INSTALLED_HERE" || { $(PY) -c "$$REQUIRE" pip setuptools && \
	  $(PY) -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .; }

# torch first and alone: a resolver that sees it next to everything else may pick another build.
$(VENV)/.torch-$(TORCH_VERSION):
	@$(BOOTSTRAP_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(BOOTSTRAP_PYTHON) is older than Python 3.10: name another, make BOOTSTRAP_PYTHON=..."; exit 1; }
	@test -x $(VENV)/bin/python || $(BOOTSTRAP_PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(BOOTSTRAP_PYTHON) cannot make a virtual environment (is its venv package installed?)"; exit 1; }
	$(PY) -m pip install --disable-pip-version-check $(TORCH_PIP_ARGS) torch==$(TORCH_VERSION)
	@touch $@

# An environment of an older checkout has the distribution under its former name.
UNINSTALL = @$(PY) -m pip uninstall --disable-pip-version-check --quiet --yes moe_ops 2>/dev/null || true
INSTALL = $(PY) -m pip install --disable-pip-version-check --quiet \
  torch==$(TORCH_VERSION) transformers==$(TRANSFORMERS_VERSION)

$(VENV)/.demo: $(VENV)/.torch-$(TORCH_VERSION) setup.py pyproject.toml
	$(UNINSTALL)
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch-$(TORCH_VERSION) setup.py pyproject.toml
	$(UNINSTALL)
	$(INSTALL) peft==$(PEFT_VERSION) -e '.[demo,peft,test,dev]'
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "torchtitan's tests skip: it needs Python 3.11"; touch $@ $(VENV)/.demo; exit 0; }; \
	  $(PY) -m pip install --disable-pip-version-check --quiet --no-deps $(TORCHTITAN)
	@touch $@ $(VENV)/.demo

# Layered over the environment of the checks: only transformers and what it insists on is new.
$(NEWEST): | $(DEV_ENV)
	rm -rf $(VENV_NEWEST)
	$(PY) -m venv --without-pip $(VENV_NEWEST)
	$(PY) -c "$$PRINT_PTH" > "$$($(VENV_NEWEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
	$(VENV_NEWEST)/bin/python -m pip install --disable-pip-version-check --quiet \
	  transformers==$(TRANSFORMERS_NEWEST_VERSION)
	@touch $@
