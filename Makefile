# Every target sets up what it needs: python3 (3.11 or newer, with pip), cargo, g++ and make are enough to begin with.
#   demo   real cells stream from disk into a model that learns
#   test   Rust tests, Python tests in .venv, then one wheel on the newest torch and other Pythons
#   check  between two edits: formats, clippy, Rust unit tests and a part of the Python tests
#   lint   rustfmt, clippy, ruff, mypy, clang-format, cargo-deny where it is installed
#   test-long  what takes longer than anybody waits: more cases of each property, fuzzing, valgrind where it is installed
#   bench  an epoch end to end (with the peers, once `make peers` has been run), and cost against size
#   peers  the environment to compare with, .venv-peers
#   docs   the guide and the API reference, from docs/ and docstrings, into docs/_build
#   wheel  one wheel for every Python and torch that are supported, to copy to other machines: dist/*.whl
#   gpu-bundle  what a GPU machine without Rust and internet needs to run the GPU suite: dist/gpu-bundle
#   clean  everything that these leave behind
.PHONY: demo test check lint ci test-long bench peers docs wheel gpu-bundle clean environment build test-rust test-python test-benches test-wheel \
	test-wheel-312 check-rust check-python
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
# the oldest torch that is supported; the wheel is tried on the newest as well
TORCH ?= 2.11.0
# as many processes as cores, which share the cores' threads
PROCESSES ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 16 ? n : 16)))
PYTEST_FLAGS ?= -q -n $(PROCESSES) --dist worksteal
# on the wheel, where the whole suite has been run on the source tree already: what depends on versions of other packages
WHEEL_TESTS ?= -m "not core"

VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
# cmake and ninja come from PyPI into .venv
WITH_VENV := PATH="$(CURDIR)/$(BIN):$$PATH" VIRTUAL_ENV="$(CURDIR)/$(VENV)"
# The op library's build and cargo's other commands must see the same of all that is set here, or each makes again what was made
# with it. scikit-build-core sets the compilers where nobody has.
export CC CXX
# For the cargo feature zfp (hdf5 needs cmake alone); PyPI's libclang lacks the headers that a compiler brings
WITH_LIBCLANG = LIBCLANG_PATH="$$($(BIN)/python -c 'import clang; print(clang.__path__[0])')/native" \
	BINDGEN_EXTRA_CLANG_ARGS="-idirafter $$($(CXX) -print-file-name=include)"
# for the cargo feature tch
WITH_TORCH = LIBTORCH_USE_PYTORCH=1 LD_LIBRARY_PATH="$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')/lib"
# One profile, one set of features: the op library, tests, benches and clippy share the dependencies. Only this crate is built anew
# for its tests, with checks.
CARGO_FEATURES := --workspace --features annbatch/internals,annbatch/tch,annbatch/zfp
CARGO_CHECKED := $(foreach set,debug-assertions=true overflow-checks=true opt-level=0,--config profile.release.package.annbatch.$(set))
CARGO_TEST := cargo test --locked --release $(CARGO_FEATURES) $(CARGO_CHECKED)
CARGO_CLIPPY := cargo clippy --locked --release --all-targets

NATIVE_SOURCES := Cargo.toml Cargo.lock build.rs CMakeLists.txt rust-toolchain.toml $(shell find src cpp -type f)
PYTHON_SOURCES := $(shell find python -name '*.py')

# First interpreter that runs, among those named $(1) on PATH and those of pyenv (whose shims may exist and not run).
find-python = $(firstword $(foreach v,$(1),$(foreach p,python$(v) $(sort $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/$(v).*/bin/python)),\
	$(shell $(p) -c 'print("$(p)")' 2>/dev/null))))

# ---- environments ----------------------------------------------------------------------------------------------------
# --without-pip: Debian's python3 makes environments only so, unless python3-venv is installed.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "annbatch needs Python 3.11 or newer and $(PYTHON) is not: pass PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv --clear --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install --quiet uv
	touch $@

$(VENV)/.dependencies: pyproject.toml $(VENV)/.created
	$(WITH_VENV) $(UV) pip install --quiet "torch==$(TORCH)" -r pyproject.toml --extra test --group dev
	touch $@

$(VENV)/.docs: $(VENV)/.dependencies
	$(WITH_VENV) $(UV) pip install --quiet --group docs
	touch $@

# Editable: Python files are used where they lie, the op library is built into python/annbatch.
$(VENV)/.installed: $(NATIVE_SOURCES) $(VENV)/.dependencies
	$(WITH_VENV) $(WITH_LIBCLANG) $(UV) pip install --no-build-isolation --no-deps --reinstall-package annbatch --editable .
	touch $@

dist/.built: $(PYTHON_SOURCES) $(VENV)/.installed
	rm -rf dist
	$(WITH_VENV) $(WITH_LIBCLANG) $(UV) build --quiet --wheel --no-build-isolation --python $(BIN)/python --out-dir dist .
	touch $@

.venv-peers/.created:
	@test -n "$(call find-python,3.12 3.13)" || { \
	  echo "the peers need Python 3.12 or newer: install one, or put it on PATH as python3.12"; exit 1; }
	$(MAKE) --no-print-directory $(VENV)/.created
	$(UV) venv --quiet --clear --no-project --python $(call find-python,3.12 3.13) .venv-peers
	$(UV) pip install --quiet --python .venv-peers/bin/python "torch==$(TORCH)" "annbatch[zarrs,numba]==0.3.1" "scDataset==0.3.0"
	touch $@

# ---- targets ---------------------------------------------------------------------------------------------------------
demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

TEST_STEPS := environment build test-rust test-python test-benches test-wheel test-wheel-312
test:
	+@$(call steps,$(TEST_STEPS))

ci:
	+@$(call steps,$(TEST_STEPS) lint docs)

check:
	+@$(call steps,lint check-rust check-python)

# Makes targets one after the other, and prints how many seconds each took, whatever becomes of them.
steps = set -e; table=; trap 'printf "\n$$table"' EXIT; for step in $(1); do start=$$(date +%s); failed=; \
	$(MAKE) --no-print-directory $$step || failed=failed; \
	table="$$table$$(printf '%7d s  %s' $$(($$(date +%s) - start)) "$$step $$failed")\n"; test -z "$$failed"; done

environment: $(VENV)/.dependencies
build: $(VENV)/.installed

# tests/ops builds CMakeLists.txt and calls the op library without Python.
test-rust: $(VENV)/.installed
	$(WITH_VENV) $(WITH_LIBCLANG) $(WITH_TORCH) $(CARGO_TEST)

check-rust: $(VENV)/.dependencies
	$(WITH_VENV) $(WITH_LIBCLANG) $(WITH_TORCH) $(CARGO_TEST) --package annbatch --lib

test-python: $(VENV)/.installed
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# a part that takes a minute: what users see of stores, loaders and samplers
CHECK_TESTS ?= $(patsubst %,tests/python/%.py,formats/test_sources loader/test_loader loader/test_loader_adding loader/test_loader_upstream \
	loader/test_obs opening/test_annotations opening/test_attributes opening/test_h5ad opening/test_labels opening/test_no_x opening/test_open \
	ops/test_ops samplers/test_samplers)
check-python: $(VENV)/.installed
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow" $(CHECK_TESTS)

# Properties over more cases, of which each run draws others, and each fuzz run for FUZZ_SECONDS; then what can do harm in memory under
# valgrind, where that is installed.
EXAMPLES ?= 20
FUZZ_SECONDS ?= 600
HARMFUL := arena decode::bits decode::blosc decode::lzf decode::scatter decode::zstandard transform::entries
test-long: $(VENV)/.installed
	ANNBATCH_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest $(PYTEST_FLAGS)
	$(WITH_VENV) $(WITH_LIBCLANG) $(WITH_TORCH) ANNBATCH_EXAMPLES=$(EXAMPLES) PROPTEST_CASES=$$((256 * $(EXAMPLES))) $(CARGO_TEST)
	$(WITH_VENV) $(WITH_LIBCLANG) $(WITH_TORCH) ANNBATCH_FUZZ_SECONDS=$(FUZZ_SECONDS) $(CARGO_TEST) --package annbatch --lib -- --ignored _fuzz
	@if command -v valgrind > /dev/null; then $(WITH_VENV) $(WITH_LIBCLANG) $(WITH_TORCH) PROPTEST_CASES=24 \
	  CARGO_TARGET_$$(rustc -vV | sed -n 's/host: //p' | tr 'a-z-' 'A-Z_')_RUNNER="valgrind --quiet --error-exitcode=1" \
	  $(CARGO_TEST) --package annbatch --lib -- --test-threads 1 $(HARMFUL); else echo "valgrind is not installed: skipped"; fi

test-benches: $(VENV)/.installed
	$(BIN)/python benches/epoch.py --quick
	$(BIN)/python benches/scale.py --quick
	$(BIN)/python benches/h5ad.py --quick

# The two ends of what one wheel serves: the newest torch on the newest Python found, and 3.12 on the oldest torch.
test-wheel: dist/.built
	@ls dist/annbatch-*-py3-none-*.whl >/dev/null || { echo "the wheel is tied to a Python:"; ls dist; exit 1; }
	$(call try-wheel,.venv-newest,$(or $(call find-python,3.13 3.12),$(PYTHON)),torch,$(WHEEL_TESTS))

test-wheel-312: dist/.built
	@$(if $(call find-python,3.12),,echo "no Python 3.12 found: the wheel is not tried on it")
	$(if $(call find-python,3.12),$(call try-wheel,.venv-312,$(call find-python,3.12),"torch==$(TORCH)",$(WHEEL_TESTS_312)))

WHEEL_TESTS_312 := -m "not core and not slow" $(patsubst %,tests/python/%.py,ops/test_ops training/test_nn loader/test_loader)
# scvi-tools is a client whose scripts must run unchanged; it needs Python 3.12
define try-wheel
	test -x $(1)/bin/python || $(UV) venv --quiet --no-project --python $(2) $(1)
	$(UV) pip install --quiet --python $(1)/bin/python --reinstall-package annbatch $(3) "scvi-tools==1.5.1; python_version >= '3.12'" \
	  "annbatch[test] @ file://$$(ls $(CURDIR)/dist/*.whl | sed 's/+/%2B/')"
	$(1)/bin/python -m pytest $(PYTEST_FLAGS) $(4)
endef

lint: $(VENV)/.dependencies
	cargo fmt --all --check
	$(WITH_VENV) $(WITH_LIBCLANG) $(WITH_TORCH) $(CARGO_CLIPPY) $(CARGO_FEATURES) -- -D warnings
	$(WITH_VENV) cargo clippy --locked --release --lib --no-default-features -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror cpp/*.cpp cpp/*.h
	@if cargo deny --version >/dev/null 2>&1; then cargo deny check; else echo "cargo-deny is not installed: skipped"; fi

# -E: pages change with docstrings, which Sphinx does not follow into every module
docs: $(VENV)/.installed $(VENV)/.docs
	$(BIN)/python -m sphinx --quiet -E -W --keep-going docs docs/_build
	@echo "docs/_build/index.html"

wheel: dist/.built
	@ls dist/*.whl

bench: $(VENV)/.installed
	$(BIN)/python benches/epoch.py $(if $(wildcard .venv-peers/.created),--peers .venv-peers/bin/python)
	$(BIN)/python benches/scale.py
	$(BIN)/python benches/h5ad.py $(if $(wildcard .venv-peers/.created),--peers .venv-peers/bin/python)

peers: .venv-peers/.created

# With torch, NumPy, pandas, scipy, h5py, xarray and pytest there already: `bash run.sh` in the folder runs the suite,
# compute-sanitizer where there is one, and the bench against scverse annbatch (with cupy and numba there), and prints a table last.
GPU_PYTHON ?= 3.12
GPU_WHEELS := anndata annotated-types array-api-compat dask donfig google-crc32c legacy-api-wrap locket msgspec natsort numcodecs partd \
	pydantic pydantic-core pydantic-settings python-dotenv scverse-misc session-info2 tqdm typing-extensions typing-inspection zarr
GPU_PEERS := annbatch==0.3.1 humanfriendly zarrs
gpu-bundle: $(VENV)/.installed
	rm -rf dist/gpu-bundle && mkdir -p dist/gpu-bundle/benches dist/gpu-bundle/tests/python
	cp -r python pyproject.toml dist/gpu-bundle
	cp -r $(addprefix tests/python/,conftest.py gpu loader ops support) dist/gpu-bundle/tests/python
	cp benches/*.py dist/gpu-bundle/benches
	mv dist/gpu-bundle/tests/python/gpu/run.sh dist/gpu-bundle
	strip -o dist/gpu-bundle/python/annbatch/_annbatch.so python/annbatch/_annbatch.so
	$(WITH_VENV) cargo bench --locked --features internals --bench ceiling --no-run --message-format=json > dist/gpu-bundle/built.json
	strip -o dist/gpu-bundle/ceiling "$$(sed -n 's/.*"name":"ceiling".*"executable":"\([^"]*\)".*/\1/p' dist/gpu-bundle/built.json)"
	rm dist/gpu-bundle/built.json
	$(call gpu-wheels,wheels,$$($(UV) pip compile --quiet --python-version $(GPU_PYTHON) --no-header --no-annotate pyproject.toml | \
	  grep -E "^($$(echo $(GPU_WHEELS) | tr ' ' '|'))=="))
	$(call gpu-wheels,peer-wheels,$(GPU_PEERS))
	find dist/gpu-bundle -name __pycache__ -prune -exec rm -rf {} +
	@size=$$(du -sm dist/gpu-bundle | cut -f1); echo "dist/gpu-bundle: $$size MiB"; test "$$size" -le 64

define gpu-wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --implementation cp \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d dist/gpu-bundle/$(1) $(2)
endef

clean:
	rm -rf .venv .venv-newest .venv-312 .venv-peers build dist docs/_build target python/annbatch/_annbatch.so
