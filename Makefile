# libetap and everything around it. `make help` lists the targets; knobs are the ?= lines (make CUDA=0 CXX=g++-12).
MAKEFLAGS += --no-builtin-rules

CXX ?= g++
NVCC ?= nvcc
CUDA ?= auto
PREFIX ?= /usr/local
BUILD ?= build
OPT ?= -O3
SANITIZE ?=

VERSION_OF = $(shell sed -n 's/^\#define ETAP_VERSION_$(1) //p' libetap/include/etap.h)
VERSION := $(call VERSION_OF,MAJOR).$(call VERSION_OF,MINOR).$(call VERSION_OF,PATCH)
SONAME := libetap.so.$(call VERSION_OF,MAJOR)
LIBRARY := $(BUILD)/libetap.so.$(VERSION)
OBJ := $(BUILD)/obj

INCLUDES := -Ilibetap/include -Ilibetap/src
WARNINGS := -Wall -Wextra -Werror
CXXFLAGS_ALL := -std=c++17 $(OPT) -g -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -ffp-contract=fast \
  $(WARNINGS) $(INCLUDES) -MMD -MP $(SANITIZE) $(CXXFLAGS)
# z,nodelete: parked threads run the library's code as long as the process lives.
LDFLAGS_ALL := -shared -pthread -Wl,-soname,$(SONAME) -Wl,--version-script=libetap/libetap.map -Wl,-z,nodelete \
  -Wl,-z,defs -static-libgcc -static-libstdc++ $(SANITIZE) $(LDFLAGS)

# One printed line for each step: $(call say,CXX,file)
say = @printf '  %-7s %s\n' '$(1)' '$(2)'
$(if $(V),,$(eval Q := @))

# ---- Features ----

ARCH := $(shell uname -m)
ISAS := $(if $(filter x86_64,$(ARCH)),avx512_bf16 avx512 avx2) portable
ISA_FLAGS_avx2 := -mavx2 -mfma -mf16c
ISA_FLAGS_avx512 := $(ISA_FLAGS_avx2) -mavx512f -mavx512bw -mavx512vl -mavx512dq
ISA_FLAGS_avx512_bf16 := $(ISA_FLAGS_avx512) -mavx512bf16

SOURCES := $(filter-out libetap/src/cuda_absent.cc libetap/src/cpu/kernel.cc, \
  $(wildcard libetap/src/*.cc libetap/src/cpu/*.cc)) libetap/src/cuda_absent.cc
OBJECTS := $(SOURCES:libetap/src/%.cc=$(OBJ)/%.o) $(ISAS:%=$(OBJ)/cpu/kernel_%.o)

# ---- The library ----

.PHONY: all
all: $(BUILD)/libetap.so

$(BUILD)/libetap.so: $(LIBRARY)
	$(Q)ln -sf libetap.so.$(VERSION) $(BUILD)/$(SONAME)
	$(Q)ln -sf $(SONAME) $@

$(LIBRARY): $(OBJECTS) libetap/libetap.map
	$(call say,LINK,$@)
	$(Q)$(CXX) $(OBJECTS) $(LDFLAGS_ALL) -o $@

$(OBJ)/%.o: libetap/src/%.cc Makefile
	$(call say,CXX,$<)
	$(Q)mkdir -p $(@D)
	$(Q)$(CXX) $(CXXFLAGS_ALL) -c $< -o $@

$(OBJ)/cpu/kernel_%.o: libetap/src/cpu/kernel.cc Makefile
	$(call say,CXX,$< ($*))
	$(Q)mkdir -p $(@D)
	$(Q)$(CXX) $(CXXFLAGS_ALL) $(ISA_FLAGS_$*) -DETAP_ISA=$* -c $< -o $@

-include $(OBJECTS:.o=.d)
