# libetap, its tests, and the demo. `make help` lists the targets.
#
# Knobs are the lines with ?= : make CUDA=0 CXX=g++-13, make install PREFIX=$HOME/.local
# A make within this one shares its jobs.
MAKEFLAGS += --no-builtin-rules $(if $(filter 0,$(MAKELEVEL)),--jobs=$(shell nproc))
.DEFAULT_GOAL := all

# Another processor than this one: make ARCH=aarch64 dist, with Debian's g++-aarch64-linux-gnu, in build/aarch64.
ARCH ?= $(shell uname -m)
CROSS := $(if $(filter-out $(shell uname -m),$(ARCH)),$(ARCH)-linux-gnu-)
CXX := $(if $(filter default,$(origin CXX)),$(CROSS)g++,$(CXX))
CC := $(if $(filter default,$(origin CC)),$(CROSS)gcc,$(CC))
PYTHON ?= python3
VENV ?= .venv
IN_VENV := $(VENV)/bin/python
PREFIX ?= /usr/local
BUILD ?= build$(CROSS:%-linux-gnu-=/%)
OPT ?= -O3
# Flags of a sanitizer build, -fsanitize=address,undefined for one; such a build has test programs but no library.
SANITIZE ?=
# auto: with the CUDA device when nvcc is found; 1: or fail; 0: without.
CUDA ?= auto
NVCC ?= nvcc
# 1: use the nvcc of the nvidia-cuda-nvcc packages of PyPI, installed into $(BUILD)/cuda.
NVCC_FROM_PYPI ?= 0
# Which: the release that the kernels are measured with.
NVCC_RELEASE ?= ==13.0.*
# NVCCFLAGS=-lineinfo lets profilers show the source; it triples the library's size.
NVCCFLAGS ?=
# 0: warnings of nvcc and ptxas, register spills among them, don't fail the build. For experiments.
NVCC_STRICT ?= 1
# -Werror: a warning fails the build; the default of the test commands, of what only tests need, and where CI is set.
WERROR ?= $(if $(CI)$(filter test% emulator,$(MAKECMDGOALS)),-Werror)
# V=1 prints the commands.
V ?=

Q := $(if $(V),,@)
say = @printf '  %-8s %s\n' '$(1)' '$(2)'

version_part = $(shell sed -n 's/^.define ETAP_VERSION_$(1) //p' libetap/include/etap.h)
MAJOR := $(call version_part,MAJOR)
VERSION := $(MAJOR).$(call version_part,MINOR).$(call version_part,PATCH)
SONAME := libetap.so.$(MAJOR)
LIBRARY := $(BUILD)/libetap.so.$(VERSION)
OBJ := $(BUILD)/obj

# ---- What to build, and with what ----

ISAS := $(if $(filter x86_64,$(ARCH)),avx512_bf16 avx512 avx2) portable
ISA_FLAGS_avx2 := -mavx2 -mfma -mf16c
ISA_FLAGS_avx512 := $(ISA_FLAGS_avx2) -mavx512f -mavx512bw -mavx512vl -mavx512dq
ISA_FLAGS_avx512_bf16 := $(ISA_FLAGS_avx512) -mavx512bf16

ifeq ($(NVCC_FROM_PYPI),1)
  CUDA_HOME := $(BUILD)/cuda/nvidia/cu13
  NVCC := $(CUDA_HOME)/bin/nvcc
  CUDA_FOUND := yes
else
  # nvcc may be a wrapper or a link: its dry run tells where its toolkit is.
  CUDA_HOME := $(shell $(NVCC) --dryrun -c -x cu /dev/null -o /dev/null 2>&1 | sed -n 's/^.. TOP=//p')
  CUDA_FOUND := $(if $(CUDA_HOME),yes)
endif
ifneq ($(CROSS),)
  # nvcc takes that processor's compiler; the run-time is in NVIDIA's package for that processor.
  NVCCFLAGS += -ccbin $(CXX) -I$(CUDA_HOME)/include
  CUDART := $(BUILD)/cudart/nvidia/cu13/lib/libcudart_static.a
endif
WITH_CUDA := $(if $(SANITIZE),,$(filter-out 0,$(if $(CUDA_FOUND),$(CUDA))))
ifeq ($(CUDA)$(CUDA_FOUND),1)
  $(error CUDA=1, but there is no nvcc (NVCC=$(NVCC)); NVCC_FROM_PYPI=1 installs one into $(BUILD)/cuda)
endif
CUDA_STATE := $(if $(WITH_CUDA),sm_90a by $(NVCC),left out: $(if $(filter 0,$(CUDA)),CUDA=0,$(if \
  $(CUDA_FOUND),a sanitizer build,no nvcc (NVCC=$(NVCC); NVCC_FROM_PYPI=1 installs one))))

SOURCES := $(filter-out libetap/src/cuda_absent.cc,$(wildcard libetap/src/*.cc)) \
  $(filter-out libetap/src/cpu/kernel.cc,$(wildcard libetap/src/cpu/*.cc)) \
  $(if $(WITH_CUDA),$(wildcard libetap/src/sm90/*.cc),libetap/src/cuda_absent.cc)
# Of the lines KERNEL(family, rows) of catalog.def: family_nROWS, each an object of instance.cu.
INSTANCE := libetap/src/sm90/instance.cu
INSTANCES := $(shell sed -n 's/^KERNEL(\(.*\), \(.*\))$$/\1_n\2/p' libetap/src/sm90/catalog.def)
CUDA_SOURCES := $(filter-out $(INSTANCE),$(wildcard libetap/src/sm90/*.cu libetap/src/sm90/schedule/*.cu))
CUDA_OBJECTS := $(if $(WITH_CUDA),$(CUDA_SOURCES:libetap/src/%.cu=$(OBJ)/%.o) $(INSTANCES:%=$(OBJ)/sm90/instances/%.o))
OBJECTS := $(SOURCES:libetap/src/%.cc=$(OBJ)/%.o) $(ISAS:%=$(OBJ)/cpu/kernel_%.o) $(CUDA_OBJECTS)

PROBE := $(if $(WITH_CUDA),$(BUILD)/libetap_probe.so)
PROBE_OBJECT := $(if $(WITH_CUDA),$(OBJ)/probe/stream.o)

INCLUDES := -Ilibetap/include -Ilibetap/src
WARNINGS := -Wall -Wextra $(WERROR)
ALL_CXXFLAGS := -std=c++17 $(OPT) -g -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -ffp-contract=fast \
  $(WARNINGS) $(INCLUDES) -MMD -MP $(SANITIZE) $(CXXFLAGS)
# -compress-all: 4 MB instead of 15.5. The driver unpacks the machine code where it loads a kernel.
ALL_NVCCFLAGS := -gencode=arch=compute_90a,code=sm_90a -std=c++17 -O3 --expt-relaxed-constexpr $(INCLUDES) \
  -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -Xptxas -v,--warn-on-spills,--warn-on-local-memory-usage \
  -Xfatbin -compress-all -MMD -MP $(NVCCFLAGS)
# z,nodelete: parked threads run the library's code for as long as the process lives.
LIBRARY_LDFLAGS := -shared -pthread -Wl,-soname,$(SONAME) -Wl,--version-script=libetap/libetap.map -Wl,-z,nodelete \
  -Wl,-z,defs
# CUDA's run-time is in it too, and must not be taken for that of PyTorch.
PROBE_LDFLAGS := -shared -pthread -Wl,-soname,libetap_probe.so -Wl,--version-script=libetap/probe/probe.map -Wl,-z,defs
ALL_LDFLAGS := $(LIBRARY_LDFLAGS) -static-libgcc -static-libstdc++ $(LDFLAGS)
CUDA_LIBS := $(if $(WITH_CUDA),$(or $(CUDART),-L$(CUDA_HOME)/lib64 -L$(CUDA_HOME)/lib -lcudart_static) -ldl -lrt -lpthread)

LIBRARY_INPUTS := $(OBJECTS) libetap/libetap.map $(OBJ)/objects $(if $(WITH_CUDA),$(CUDART))

# ---- The library ----

.PHONY: all features
all: $(BUILD)/libetap.so  ## the library; with nvcc also the stream probe, which etap-bench loads from beside it

features:
	$(call say,libetap,$(VERSION) by $(CXX))
	$(call say,cpu,$(ISAS) (chosen at run time))
	$(call say,cuda,$(CUDA_STATE))

$(BUILD)/libetap.so: $(LIBRARY) $(PROBE)
	$(Q)ln -sf libetap.so.$(VERSION) $(BUILD)/$(SONAME)
	$(Q)ln -sf $(SONAME) $@
	$(if $(PROBE),,$(Q)rm -f $(BUILD)/libetap_probe.so)

$(LIBRARY): $(LIBRARY_INPUTS)
	$(call say,LINK,$@)
	$(Q)$(CXX) $(OBJECTS) $(ALL_LDFLAGS) $(CUDA_LIBS) -o $@

# The memory ceiling of benchmarks: brings pages into shared memory and does no arithmetic. No part of the library.
$(PROBE): $(PROBE_OBJECT) libetap/probe/probe.map $(CUDART)
	$(call say,LINK,$@)
	$(Q)$(CXX) $(PROBE_OBJECT) $(PROBE_LDFLAGS) -static-libgcc -static-libstdc++ $(LDFLAGS) $(CUDA_LIBS) -o $@

# Changes when the list of objects does, with CUDA=0 or a new file: then the library is linked anew.
$(OBJ)/objects: features
	@mkdir -p $(@D)
	@echo '$(OBJECTS)' | cmp -s - $@ || echo '$(OBJECTS)' > $@

$(OBJ)/%.o: libetap/src/%.cc Makefile | features
	$(call say,CXX,$<)
	@mkdir -p $(@D)
	$(Q)$(CXX) $(ALL_CXXFLAGS) $(if $(findstring sm90,$<),-isystem $(CUDA_HOME)/include) -c $< -o $@

$(OBJ)/cpu/kernel_%.o: libetap/src/cpu/kernel.cc Makefile | features
	$(call say,CXX,$< ($*))
	@mkdir -p $(@D)
	$(Q)$(CXX) $(ALL_CXXFLAGS) $(ISA_FLAGS_$*) -DETAP_ISA=$* -c $< -o $@

# A warning of nvcc or ptxas (register spills and local memory are such) fails the build. Registers and shared memory of
# each kernel are in the .log beside the object.
nvcc_logged = $(Q)$(NVCC) $(ALL_NVCCFLAGS) $(1) > $@.log 2>&1 || { cat $@.log; exit 1; }; \
  if grep -i 'warning' $@.log && [ $(NVCC_STRICT) != 0 ]; then rm -f $@; exit 1; fi

$(OBJ)/%.o: libetap/src/%.cu Makefile | features $(if $(filter 1,$(NVCC_FROM_PYPI)),$(NVCC))
	$(call say,NVCC,$<)
	@mkdir -p $(@D)
	$(call nvcc_logged,-c $< -o $@)

$(OBJ)/sm90/instances/%.o: family = $(firstword $(subst _n, ,$*))
$(OBJ)/sm90/instances/%.o: $(INSTANCE) Makefile | features $(if $(filter 1,$(NVCC_FROM_PYPI)),$(NVCC))
	$(call say,NVCC,$< ($*))
	@mkdir -p $(@D)
	$(call nvcc_logged,-DETAP_FAMILY=$(family) '-DETAP_FAMILY_HEADER="sm90/kernels/$(family).cuh"' -DETAP_ROWS=$(lastword \
	  $(subst _n, ,$*)) -c $< -o $@)

$(OBJ)/probe/%.o: libetap/probe/%.cu Makefile | features $(if $(filter 1,$(NVCC_FROM_PYPI)),$(NVCC))
	$(call say,NVCC,$<)
	@mkdir -p $(@D)
	$(call nvcc_logged,-c $< -o $@)

$(BUILD)/cuda/nvidia/cu13/bin/nvcc:
	$(call say,PIP,nvidia-cuda-nvcc into $(BUILD)/cuda)
	$(Q)$(PYTHON) -m pip install -q --target $(BUILD)/cuda $(addsuffix $(NVCC_RELEASE),nvidia-cuda-nvcc nvidia-nvvm \
	  nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cuda-profiler-api)

$(BUILD)/cudart/nvidia/cu13/lib/libcudart_static.a:
	$(call say,PIP,nvidia-cuda-runtime for $(ARCH) into $(BUILD)/cudart)
	$(Q)$(PYTHON) -m pip install -q --target $(BUILD)/cudart --no-deps --only-binary :all: --platform manylinux2014_$(ARCH) \
	  nvidia-cuda-runtime$(NVCC_RELEASE)

-include $(OBJECTS:.o=.d) $(PROBE_OBJECT:.o=.d)

# ---- The library of the wheels ----

# The same objects, linked for systems with glibc $(GLIBC) or later: zig knows which symbols that one has, and brings the
# unwinder; GCC's C++ run-time is the machine's. What the machine's headers and libraries ask of a newer glibc is an
# undefined symbol here.
GLIBC := 2.28
MANYLINUX := manylinux_$(subst .,_,$(GLIBC))_$(ARCH)
ZIG ?= $(IN_VENV) -m ziglang
linked_by_zig = $(Q)$(ZIG) cc -target $(ARCH)-linux-gnu.$(GLIBC) $(1) libetap/src/older_glibc.c \
  -Wl,--gc-sections -Wl,--strip-debug $(CUDA_LIBS) "$$($(CXX) -print-file-name=libstdc++.a)" \
  "$$($(CXX) -print-libgcc-file-name)" -lunwind -ldl -lrt -lpthread -lm -o $@
PORTABLE_PROBE := $(if $(WITH_CUDA),$(BUILD)/$(MANYLINUX)/libetap_probe.so)
$(BUILD)/$(MANYLINUX)/libetap.so: $(LIBRARY_INPUTS) libetap/src/older_glibc.c $(PORTABLE_PROBE) | venv
	$(call say,LINK,$@)
	@mkdir -p $(@D)
	$(call linked_by_zig,$(OBJECTS) $(LIBRARY_LDFLAGS))

$(PORTABLE_PROBE): $(PROBE_OBJECT) libetap/probe/probe.map libetap/src/older_glibc.c $(CUDART) | venv
	$(call say,LINK,$@)
	@mkdir -p $(@D)
	$(call linked_by_zig,$(PROBE_OBJECT) $(PROBE_LDFLAGS))

# ---- Wheels and source distribution ----

DIST := dist$(CROSS:%-linux-gnu-=-%)
PACKAGES := bench $(addprefix integrations/,flash_attn_3 flashinfer flashmla sglang vllm)
PYTHON_BUILD := BUILD=$(BUILD) $(IN_VENV) -m build --no-isolation --outdir $(DIST)
.PHONY: dist wheels
dist: $(BUILD)/$(MANYLINUX)/libetap.so venv
	$(call say,DIST,$(DIST))
	$(Q)rm -rf $(DIST) $(BUILD)/wheel $(PACKAGES:%=%/build)
	$(Q){ $(PYTHON_BUILD) --sdist . && $(PYTHON_BUILD) --wheel -C=--build-option=--plat-name=$(MANYLINUX) . && \
	  for package in $(PACKAGES); do $(PYTHON_BUILD) --wheel $$package || exit 1; done; \
	} > $(BUILD)/dist.log 2>&1 || { cat $(BUILD)/dist.log; exit 1; }

wheels: dist  ## the wheels and the source distribution in dist/, checked
	$(Q)cd $(DIST) && ls -s --block-size=K
	$(PYTEST) tests/wheels

# ---- Installation ----

# Paths go to the shell as variables: they may hold anything, blanks and quotes among it.
.PHONY: install
install: export ETAP_PREFIX = $(PREFIX)
install: export ETAP_DESTINATION = $(DESTDIR)$(PREFIX)
install: all  ## install header, library and pkg-config file under PREFIX
	@printf '  %-8s %s\n' INSTALL "$$ETAP_DESTINATION"
	$(Q)install -d "$$ETAP_DESTINATION/include" "$$ETAP_DESTINATION/lib/pkgconfig"
	$(Q)install -m 644 libetap/include/etap.h "$$ETAP_DESTINATION/include"
	$(Q)install -m 755 $(LIBRARY) "$$ETAP_DESTINATION/lib"
	$(Q)ln -sf libetap.so.$(VERSION) "$$ETAP_DESTINATION/lib/$(SONAME)"
	$(Q)ln -sf $(SONAME) "$$ETAP_DESTINATION/lib/libetap.so"
	$(Q){ printf 'prefix=%s\n' "$$ETAP_PREFIX"; sed 's|@VERSION@|$(VERSION)|' libetap/etap.pc.in; } \
	  > "$$ETAP_DESTINATION/lib/pkgconfig/etap.pc"

# ---- C programs: tests, the example, the roofs of the CPU benchmark ----

C_FLAGS := -O2 -g $(WARNINGS) -Ilibetap/include -Itests/c -MMD -MP $(SANITIZE)
C99 := $(CC) -std=c99 -pedantic $(C_FLAGS)
C_AS_CXX := $(CXX) -x c++ -std=c++17 -pedantic $(C_FLAGS)
TEST_PROGRAMS := $(patsubst tests/c/%.c,$(BUILD)/tests/%,$(wildcard tests/c/test_*.c)) $(BUILD)/tests/test_contract_cxx
# A sanitizer's run-time belongs to the program, so there the library's objects do as well.
LINKED := $(if $(SANITIZE),$(OBJECTS),$(BUILD)/libetap.so)
LINK := $(if $(SANITIZE),$(CXX) $(SANITIZE),$(CC))
LINK_LIBS := $(if $(SANITIZE),$(OBJECTS),-L$(BUILD) -letap '-Wl,-rpath,$$ORIGIN/..' '-Wl,-rpath,$$ORIGIN') -pthread -lm

.PHONY: programs
programs: $(TEST_PROGRAMS) $(if $(SANITIZE),,$(BUILD)/decode $(BUILD)/cpu_roofs)

$(BUILD)/tests/%.o: tests/c/%.c Makefile
	$(call say,CC,$<)
	@mkdir -p $(@D)
	$(Q)$(C99) -c $< -o $@

$(BUILD)/tests/%_cxx.o: tests/c/%.c Makefile
	$(call say,CXX,$< (as C++))
	@mkdir -p $(@D)
	$(Q)$(C_AS_CXX) -c $< -o $@

$(BUILD)/tests/%: $(BUILD)/tests/%.o $(BUILD)/tests/harness.o $(LINKED)
	$(Q)$(LINK) $< $(BUILD)/tests/harness.o $(LINK_LIBS) -o $@

$(BUILD)/decode: examples/decode.c $(LINKED) Makefile
	$(call say,CC,$<)
	$(Q)$(C99) $< $(LINK_LIBS) -o $@

$(BUILD)/cpu_roofs: tests/bench/cpu_roofs.cc Makefile
	$(call say,CXX,$<)
	$(Q)$(CXX) -std=c++17 -O3 $(WARNINGS) -MMD -MP -pthread $< -o $@

.PRECIOUS: $(BUILD)/tests/%.o $(BUILD)/tests/%_cxx.o
-include $(wildcard $(BUILD)/tests/*.d $(BUILD)/*.d)

# ---- The CUDA kernels compiled as C++, for a machine without a GPU (tests/emulator) ----

EMULATOR := $(BUILD)/emulator/libetap.so
EMULATED := token_split_n8 token_split_n16 token_split_n32 dv_split_n40 rows_on_m_n64 e4m3_split_n16 e4m3_split_n24 \
  e4m3_dv_split_n32 e4m3_dv_split_n40 e4m3_dv_split_n48 e4m3_dv_split_n64
EMULATOR_SOURCES := $(wildcard libetap/src/*.cc) libetap/src/sm90/dispatch.cc libetap/src/sm90/decode_params.cc \
  $(wildcard tests/emulator/*.cc)
EMULATED_MERGES := $(BUILD)/emulator/merge.o $(BUILD)/emulator/merge_pieces.o
EMULATOR_OBJECTS := $(EMULATOR_SOURCES:%.cc=$(BUILD)/emulator/%.o) $(EMULATED:%=$(BUILD)/emulator/%.o) \
  $(EMULATED_MERGES)
# psabi: a parameter is aligned to 128 bytes. clobbered: fibers change stacks. alignment: a GPU traps where this processor
# does not.
EMULATOR_CXX = $(CXX) -std=c++17 -O1 -g -fPIC -fvisibility=hidden $(WARNINGS) -Wno-unknown-pragmas -Wno-psabi \
  -Wno-clobbered -fsanitize=alignment -fno-sanitize-recover=alignment -include tests/emulator/one_more.h \
  -Itests/emulator $(INCLUDES) -isystem $(CUDA_HOME)/include -MMD -MP

.PHONY: emulator more-cpu
emulator: $(if $(WITH_CUDA),$(EMULATOR)) more-cpu  ## some CUDA kernels as C++ on the host, for tests/emulator

# The CPU device with the tile, format and widths of tests/emulator/one_more.h, which the emulator has too.
more-cpu:
	$(Q)$(MAKE) --no-print-directory all BUILD=$(BUILD)/more CUDA=0 WERROR='$(WERROR)' CXXFLAGS='-include tests/emulator/one_more.h $(CXXFLAGS)'

$(EMULATOR): $(EMULATOR_OBJECTS)
	$(call say,LINK,$@)
	$(Q)$(CXX) -shared -pthread -fsanitize=alignment -Wl,-z,nodelete $^ -o $@

$(BUILD)/emulator/%.o: %.cc Makefile | $(if $(filter 1,$(NVCC_FROM_PYPI)),$(NVCC))
	$(call say,CXX,$< (for the emulator))
	@mkdir -p $(@D)
	$(Q)$(EMULATOR_CXX) -c $< -o $@

$(EMULATED_MERGES): $(BUILD)/emulator/%.o: libetap/src/sm90/%.cu Makefile | $(if $(filter 1,$(NVCC_FROM_PYPI)),$(NVCC))
	$(call say,CXX,$< (for the emulator))
	@mkdir -p $(@D)
	$(Q)$(EMULATOR_CXX) -x c++ -c $< -o $@

$(EMULATED:%=$(BUILD)/emulator/%.o): family = $(firstword $(subst _n, ,$*))
$(EMULATED:%=$(BUILD)/emulator/%.o): $(BUILD)/emulator/%.o: $(INSTANCE) Makefile | $(if $(filter 1,$(NVCC_FROM_PYPI)),$(NVCC))
	$(call say,CXX,$< ($* for the emulator))
	@mkdir -p $(@D)
	$(Q)$(EMULATOR_CXX) -x c++ -DETAP_FAMILY=$(family) '-DETAP_FAMILY_HEADER="sm90/kernels/$(family).cuh"' \
	  -DETAP_ROWS=$(lastword $(subst _n, ,$*)) -c $< -o $@

-include $(EMULATOR_OBJECTS:.o=.d)

# ---- Python environment, tests, demo, benchmarks ----

LIBRARY_CODE := $(wildcard libetap/include/*.h libetap/src/*.[hc] libetap/src/*.cc libetap/src/*/*.h libetap/src/*/*.cc \
  libetap/src/*/*.cu libetap/src/sm90/*/*.h libetap/src/sm90/*/*.cuh libetap/src/sm90/*/*.cu libetap/probe/*.cu tests/c/*.[hc] \
  tests/bench/*.cc tests/emulator/*.[hc]* tests/emulator/sm90/ptx/*.cuh examples/*.c)
PYTHON_CODE := $(wildcard etap_py bench integrations scripts tests)
PYTEST := ETAP_BUILD=$(BUILD) $(IN_VENV) -m pytest
ETAP := $(IN_VENV) -m etap_py

.PHONY: venv test test-c test-sanitize test-gpu lint format sanitizers demo bench bench-store bench-gpu clean help
venv: $(VENV)/.complete
$(VENV)/.complete: scripts/make_venv.sh pyproject.toml $(wildcard requirements/*.txt) bench/requirements.txt
	$(call say,VENV,$(VENV))
	$(Q)PYTHON='$(PYTHON)' scripts/make_venv.sh $(VENV)
	@touch $@

SANITIZERS := address thread
sanitizers: $(SANITIZERS:%=sanitizer-%)
.PHONY: $(SANITIZERS:%=sanitizer-%)
sanitizer-address: FLAGS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
sanitizer-thread: FLAGS := -fsanitize=thread
$(SANITIZERS:%=sanitizer-%): sanitizer-%:
	$(Q)$(MAKE) --no-print-directory programs BUILD=$(BUILD)/$* OPT=-O1 SANITIZE='$(FLAGS)' WERROR='$(WERROR)'

test: all programs emulator dist sanitizers lint venv  ## everything that needs no GPU: lint, C, sanitizers, ABI, Python, SGLang
	$(PYTEST) tests

test-c: all programs venv  ## the C programs and the ABI record
	$(PYTEST) tests/c tests/abi -m 'not sanitizer'

test-sanitize: sanitizers venv  ## the C programs under AddressSanitizer, UBSan and ThreadSanitizer
	$(PYTEST) tests/c -m sanitizer

test-gpu: all venv  ## the GPU suite; needs an SM90 GPU
	$(PYTEST) tests/gpu tests/dropins tests/vllm tests/sglang -m gpu

LINTS := ruff mypy clang-format
comma := ,
lint: $(LINTS:%=lint-%)  ## ruff, mypy --strict, clang-format; changes nothing
.PHONY: $(LINTS:%=lint-%)

lint-ruff: venv
	$(call say,LINT,ruff)
	$(Q)$(VENV)/bin/ruff check -q $(PYTHON_CODE)
	$(Q)$(VENV)/bin/ruff format -q --check $(PYTHON_CODE)

DROPINS := flashmla/etap_flashmla flashinfer/etap_flashinfer flash_attn_3/etap_flash_attn_3
lint-mypy: venv
	$(call say,LINT,mypy --strict etap_py$(comma) etap_bench and the drop-ins)
	$(Q)MYPYPATH=.:bench $(IN_VENV) -m mypy --strict etap_py bench/etap_bench $(DROPINS:%=integrations/%)

lint-clang-format: venv
	$(call say,LINT,clang-format)
	$(Q)$(VENV)/bin/clang-format --dry-run -Werror $(LIBRARY_CODE)

format: venv  ## format all code in place
	$(Q)$(VENV)/bin/ruff format -q $(PYTHON_CODE)
	$(Q)$(VENV)/bin/clang-format -i $(LIBRARY_CODE)

demo: all venv  ## serve a small MLA model with SGLang on libetap and ask it things
	$(Q)$(IN_VENV) scripts/demo.py

bench: all $(BUILD)/cpu_roofs venv  ## fixed shapes on the devices at hand, compared with the last stored run of the same card
	$(Q)$(PYTEST) tests/bench --benchmark-only --results=$(BUILD)/bench-cpu.json,$(BUILD)/bench-gpu.json
	$(Q)$(foreach device,cpu gpu,test ! -e $(BUILD)/bench-$(device).json || $(ETAP) history compare $(BUILD)/bench-$(device).json;)

bench-store: venv  ## add the last run of `make bench` to benchmarks/, and draw the trends
	$(Q)$(foreach device,cpu gpu,test ! -e $(BUILD)/bench-$(device).json || $(ETAP) history store $(BUILD)/bench-$(device).json;)
	$(Q)$(ETAP) history page $(BUILD)/trends.html

bench-gpu: all venv  ## the CUDA device against the memory ceiling and its peers, in bursts and under load
	$(Q)$(ETAP) bench published more --device cuda --sustain 1 -o $(BUILD)/bench-table.json $(ARGS)

clean:  ## remove what was built; the virtual environment stays
	rm -rf $(BUILD)

help:
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24
