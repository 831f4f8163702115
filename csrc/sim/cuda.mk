# SPDX-License-Identifier: Apache-2.0
#
# Builds libascendcl.so over CUDA into PREFIX/lib64, for the measurements in benchmarks/.
#   make -C csrc/sim -f cuda.mk PREFIX=<absolute folder> ACL_INCLUDE=<folder with acl/acl.h>

CUDA_HOME ?= /usr/local/cuda
BUILD := $(PREFIX)/.build
CXX := g++
CXXFLAGS := -std=c++17 -O2 -fPIC -pthread -MMD -MP -Wall -Wextra -fvisibility=hidden -iquote . \
  -DFUNC_VISIBILITY -DSIM_CANN_VERSION='"8.5.0"' \
  -isystem $(ACL_INCLUDE) -isystem $(CUDA_HOME)/include
LIBS := -L$(CUDA_HOME)/lib64 -lcudart_static -ldl -lrt

# The AscendCL layer is the same source as for the other device.
SOURCES := $(patsubst %.cpp,%,$(wildcard *.cpp ascendcl/*.cpp state/*.cpp device/cuda*.cpp))

$(PREFIX)/lib64/libascendcl.so: $(SOURCES:%=$(BUILD)/%.o)
	@mkdir -p $(@D)
	$(CXX) -shared -pthread -Wl,-soname,$(@F) -Wl,-z,defs -o $@ $^ $(LIBS)

$(BUILD)/%.o: %.cpp cuda.mk
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -c -o $@ $<

-include $(wildcard $(BUILD)/*.d $(BUILD)/*/*.d)
