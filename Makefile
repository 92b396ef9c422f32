# Everything happens in .venv; `make setup` makes it, and every other target makes it first if it is not there.
#   make match [SRC=a.jpg TRG=b.jpg]   match two photographs: out/match.png and out/match.json
#   make engines [ENGINES='--sizes 512,768 --model DIR']   engines on every backend and in every precision
#   make test | lint | bench | reproduce | gpu-check
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= pocket
OUT ?= out
POINTS ?= --points examples/collins.csv --heat 1
SRC ?= examples/collins.jpg
TRG ?= examples/hopper.jpg
ifneq ($(SRC),examples/collins.jpg)
POINTS := --grid 5 --heat 13
endif
# Where PyTorch's CPU builds are found if the package index at hand has none. Without a GPU, the default Linux build
# would bring gigabytes of CUDA libraries that nothing uses.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_VERSION ?= 2.13.0
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CONSTRAINTS := constraints.txt
# Everything that runs and is tested here; TensorRT for RTX, which builds without a GPU too, where there are wheels of it.
EXTRAS := export,bench,openvino,tune,prototypes,index,milvus,store,ray,dev
ifeq ($(shell uname -sm),Linux x86_64)
EXTRAS := $(EXTRAS),tensorrt-rtx
endif
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)

.PHONY: setup base dev match test quick slow-test lint format engines bench reproduce gpu-check pocket-graphs clean
.DELETE_ON_ERROR:

setup: dev

# The base install: enough to match, with no torch.
base: $(VENV)/.base
$(VENV)/.base: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11; give another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@echo 'setting up $(VENV) ...'
	@$(PIP) install -c $(CONSTRAINTS) -e .
	@touch $@

# Torch first, of the right kind, so that nothing after it pulls another.
dev: $(VENV)/.dev
$(VENV)/.dev: $(VENV)/.base
	@echo 'adding torch and the tools for tests ...'
ifeq ($(HAS_GPU),yes)
	@$(PIP) install "torch==$(TORCH_VERSION)"
else ifeq ($(shell uname -s),Linux)
	@$(PIP) install "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
	  || $(PIP) install "torch==$(TORCH_VERSION)+cpu" --extra-index-url $(TORCH_CPU_INDEX)
else
	@$(PIP) install "torch==$(TORCH_VERSION)"
endif
	@$(PIP) install -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

match: base
	@mkdir -p "$(OUT)"
	@$(BIN)/difftap match "$(SRC)" "$(TRG)" $(POINTS) --recipe "$(RECIPE)" -o "$(OUT)/match.png" \
	  > "$(OUT)/.match.json.part" || { rm -f "$(OUT)/.match.json.part"; exit 2; }
	@mv "$(OUT)/.match.json.part" "$(OUT)/match.json"
	@echo "wrote $(OUT)/match.png and $(OUT)/match.json"

test: dev
	$(BIN)/python -m pytest -n auto

# What one runs while working: no network is traced, built or trained, nothing is killed.
quick: dev
	$(BIN)/python -m pytest -n auto -m "not heavy and not slow and not gpu and not weights"

# Full-size Stable Diffusion networks with seeded random weights: about 10 GB of disk, 16 GB of memory.
slow-test: dev
	$(BIN)/python -m pytest -m slow

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

engines: dev
	$(BIN)/difftap engines build --recipe $(RECIPE) --backend all --precision all $(ENGINES)

# The poster's table, on whatever is at hand: data sets by SPAIR=, PF_PASCAL=, PF_WILLOW=, a checkpoint by MODEL=.
SPAIR ?= $(wildcard ../shared/data/spair-mini)
PF_WILLOW ?= $(wildcard ../shared/data/pf-willow-half)
reproduce: dev
	$(BIN)/difftap bench reproduce -o "$(OUT)/reproduce" $(if $(SPAIR),--spair "$(SPAIR)") \
	  $(if $(PF_PASCAL),--pf-pascal "$(PF_PASCAL)") $(if $(PF_WILLOW),--pf-willow "$(PF_WILLOW)") \
	  $(if $(SPAIR)$(PF_PASCAL)$(PF_WILLOW),,--synthetic examples) $(if $(MODEL),--model "$(MODEL)") \
	  $(if $(PROMPTS),--prompts-root "$(PROMPTS)") $(REPRODUCE)

# Speed and quality of what ships, on one page: out/bench/bench.html and bench.md.
bench: dev
	@mkdir -p "$(OUT)/bench"
	$(BIN)/difftap bench throughput --backends ort,openvino --rounds 2 -o "$(OUT)/bench/throughput"
	$(BIN)/difftap bench pck $(if $(PF_WILLOW),pf-willow "$(PF_WILLOW)",synthetic examples) --recipe pocket --overwrite \
	  $(if $(PF_WILLOW),--per-class 10) -o "$(OUT)/bench/pck"
	$(BIN)/python benchmarks/page.py "$(OUT)/bench"

# On a machine with an NVIDIA GPU: builds, checks and times every GPU backend that is installed; docs/gpu.md says how to
# bring wheels to one without a network. It installs nothing: it takes .venv's difftap, or the one on the PATH.
gpu-check:
	$(if $(wildcard $(BIN)/difftap),$(BIN)/difftap,difftap) bench gpu-check -o "$(OUT)/gpu-check" $(GPU_CHECK)

# After the embedded model's weights change: its graphs, which ship beside it so that matching needs no torch.
pocket-graphs: dev
	for taps in "down2.attn0" "mid" "up0" "up1" "up2" "up1 --tap up2"; do \
	  $(BIN)/difftap export --model pocket --beside --tap $$taps || exit 1; \
	done

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
