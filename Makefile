# The installed `pyaccel` command is used, not `python -m pyaccel`: that would import the source folder, which has no kernels.
#
# make demo      set up a virtual environment, build, train a spiking network on real digits, write a report
# make test      set up, build, run the tests
# make sanitize  the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer
# make build     build the extension in place, for work on the kernels (uses .venv)
# make bench     the benchmarks of the neuron family
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# Threads that wait must sleep: spinning ones take the cores from whatever else the machine does.
export OMP_WAIT_POLICY ?= passive
SOURCES := $(shell find csrc pyaccel -name '*.py' -o -name '*.pyi' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | sort)
.PHONY: demo test sanitize build bench clean

demo: $(VENV)/installed
	$(VENV)/bin/pyaccel run bntt --preset desk --data digits --out demo-run

# Each test runs on one thread, so the files are spread over the cores; `pytest` alone runs them one after the other.
SPREAD := -n auto --maxprocesses 8 --dist loadfile
test: $(VENV)/installed
	$(VENV)/bin/pytest $(SPREAD)

bench: $(VENV)/installed
	$(VENV)/bin/pyaccel bench neuron

$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(SOURCES)
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt ".[test]"
	@touch $@

# In place: pyaccel/_C*.so beside the sources; then PYTHONPATH=. runs the tree.
CMAKE_FLAGS = -G Ninja -DPython_EXECUTABLE=$(abspath $(RUN)) -DCMAKE_BUILD_TYPE=Release
TOOLS = $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt pybind11 ninja cmake
build: $(VENV)/installed
	$(TOOLS)
	PATH=$(abspath $(VENV)/bin):$$PATH cmake -S . -B build/tree $(CMAKE_FLAGS) -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath pyaccel)
	PATH=$(abspath $(VENV)/bin):$$PATH cmake --build build/tree

# A copy of the package with sanitized kernels; gcc's runtimes are preloaded because python itself is not sanitized.
SANITIZED := build/sanitize/package
SANITIZED_TESTS := lif bntt encode fuzz fuzz_spikes stdb sram crossbar_matrix crossbar_matmul qmac
PRELOAD = $(shell gcc -print-file-name=libasan.so):$(shell gcc -print-file-name=libubsan.so):$(shell gcc -print-file-name=libstdc++.so)
sanitize: $(VENV)/installed
	$(TOOLS)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r pyaccel $(SANITIZED)/ && rm -f $(SANITIZED)/pyaccel/_C*.so
	PATH=$(abspath $(VENV)/bin):$$PATH PYACCEL_CUDA=off cmake -S . -B build/sanitize/tree $(CMAKE_FLAGS) -DPYACCEL_CUDA=off \
		-DPYACCEL_SANITIZE=ON -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath $(SANITIZED)/pyaccel) > build/sanitize/configure.log
	PATH=$(abspath $(VENV)/bin):$$PATH cmake --build build/sanitize/tree
	PYTHONPATH=$(abspath $(SANITIZED)) LD_PRELOAD=$(PRELOAD) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(VENV)/bin/pytest $(SPREAD) $(addprefix python_tests/ops/test_,$(addsuffix .py,$(SANITIZED_TESTS)))

clean:
	rm -rf build $(VENV) demo-run
