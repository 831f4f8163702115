# SPDX-License-Identifier: Apache-2.0
#
# vllm-ascend's own sleep-mode allocator, from its source distribution as it is: its compiled library
# links CANN libraries that are not simulated, this file of it needs AscendCL alone.
#   make -f camem.mk SOURCE=<vllm_ascend-….tar.gz> OUT=<folder> TOOLKIT=<folder> PYTHON=<python>

SUFFIX := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
PYTHON_INCLUDE := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_paths()["include"])')

$(OUT)/vllm_ascend_C$(SUFFIX): $(OUT)/camem_allocator.cpp
	$(CXX) -std=c++17 -O2 -fPIC -shared -w -I$(PYTHON_INCLUDE) -I$(TOOLKIT)/include -o $@ $< \
	  -L$(TOOLKIT)/lib64 -lascendcl

$(OUT)/camem_allocator.cpp: $(SOURCE)
	@mkdir -p $(OUT)
	tar -xzOf $< --wildcards '*/csrc/camem_allocator.cpp' > $@
