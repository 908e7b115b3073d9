# make demo   a virtual environment, a merged bundle of the bundled model, an answer, and the proof of parity
# make test   a virtual environment, linters, types and the test suite
# make slow   the tests that take longer; adds Ray (79 MB), its Serve and MkDocs, whose tests are skipped where they cannot be had
# make docs   the site of docs/ and of the Python API, into site/, with warnings as errors
# make reference the reference of the commands in docs/commands/, from the commands
# make fuzz   the readers of strangers' files, twenty seconds each
# make lowest the lowest versions that pyproject.toml allows: 7 GB, a quarter of an hour
# make table  the README's right answers, counted anew by `evaluate` in an hour or two; goes on where it was stopped
# make gallery the README's pictures of a report
# make bench  every combination of KV cache, merging and commit rule on the bundled model and at LaViDa's proportions
# make loops  the release's loop, ours on PyTorch, compiled and on ONNX Runtime at LaViDa's proportions, in turns
# make decoding answers in few steps on the bundled model, beside the release's loop
# make scaling a step's time over visual tokens, answer length and layers, against the FLOP model
# make cpu    what each rewrite of the CPU's graphs gains, which kernels are fastest, and where the time goes
# make export seconds, memory and bytes of a build, for each known geometry up to 8B
# make start  what a start takes, of a bundle that the machine has seen and of one that it has not
# make sampling what sampling costs beside a greedy step, at LaViDa's vocabulary
# make memory the memory of cached answers over 8, 32 and 128 steps
# make gpu    what a borrowed GPU is asked first, in ten minutes, without a network; without a GPU: what that would be
# make gpu-parcel packs what such a machine lacks: the bundle, and wheels in parts of at most 60 MB

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUNDLE := lavida-tiny-d3tom-l2-r0.9
BOTH := $(BUNDLE)-both
FEW := $(BOTH)-prefill
RESULTS := accuracy.jsonl
EVALUATE := $(BIN)/d3tom-export evaluate --results $(RESULTS)
PICTURE := examples/lavida_tiny/pictures/digits.png
SOURCES := d3tom_export cli plugins tests examples benchmarks docs
INSTALL := $(BIN)/pip install --no-compile --quiet --disable-pip-version-check --constraint constraints.txt

PARCEL := gpu-parcel
GPU_WHEELS ?= cuda-bindings onnx-ir onnxscript onnxruntime-gpu tensorrt-rtx msgspec safetensors ml-dtypes

.PHONY: demo test slow docs reference fuzz lowest table gallery bench loops decoding scaling cpu export start sampling memory gpu gpu-parcel clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/d3tom-export build --layer 2 --ratio 0.9 --output $(BUNDLE) --force
	$(BIN)/d3tom-export run $(BUNDLE) --image $(PICTURE) --prompt "What do you see?"
	$(BIN)/d3tom-export validate $(BUNDLE) --samples 8

test: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check --quiet $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

slow: $(READY)
	-$(INSTALL) --editable ".[docs]"
	-$(INSTALL) --editable ".[ray]" "ray[serve]"
	$(BIN)/python -m pytest -m "slow and not alone" -n $(WORKERS) --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m alone

reference: $(READY)
	$(BIN)/python -m docs.reference

docs: reference
	$(INSTALL) --editable ".[docs]"
	$(BIN)/python -m mkdocs build --strict

fuzz: $(READY)
	-$(INSTALL) --editable ".[fuzz]"
	$(BIN)/python -m tests.fuzz --seed 1

lowest: $(READY)
	$(BIN)/python -m pytest -m scheduled

$(BOTH): $(READY)
	$(BIN)/d3tom-export build --layer 2 --ratio 0.9 --kv-cache both --output $(BOTH) --force

table: $(READY)
	$(EVALUATE) --loop uncached,cached --layer 2 --ratio 0.9
	$(EVALUATE) --layer 2 --ratio 0.9 --select decider,random,uniform,fastv

$(BUNDLE): $(READY)
	$(BIN)/d3tom-export build --layer 2 --ratio 0.9 --output $(BUNDLE) --force

gallery: $(BUNDLE)
	$(EVALUATE) --layer 2 --ratio 0.5,0.7,0.9 --select decider,random,uniform,fastv --samples 64 --json evaluation.json
	$(BIN)/d3tom-export report $(BUNDLE) --evaluation evaluation.json --output report.html
	$(BIN)/python -m benchmarks.gallery report.html docs/images

bench: $(BOTH)
	$(BIN)/d3tom-export bench $(BOTH)
	$(BIN)/d3tom-export bench $(BOTH) --remerge per-block
	$(BIN)/python -m benchmarks.proportions

loops: $(READY)
	$(BIN)/python -m benchmarks.loops --per-block

$(FEW): $(READY)
	$(BIN)/d3tom-export build --layer 2 --ratio 0.9 --kv-cache both --merge-at prefill --output $(FEW) --force

decoding: $(FEW)
	$(BIN)/python -m benchmarks.decoding $(FEW)

scaling: $(READY)
	$(BIN)/python -m benchmarks.scaling

cpu: $(READY)
	$(BIN)/python -m benchmarks.cpu_graphs
	$(BIN)/python -m benchmarks.cpu_kernels
	$(BIN)/python -m benchmarks.cpu_profile

export: $(READY)
	$(BIN)/python -m benchmarks.export_cost

start: $(READY)
	$(BIN)/python -m benchmarks.start_up

sampling: $(READY)
	$(BIN)/python -m benchmarks.sampling

memory: $(READY)
	$(BIN)/python -m benchmarks.cache_memory

gpu:
	$(PYTHON) -m benchmarks.gpu --wheels $(PARCEL)/wheels $(patsubst %,--bundle %,$(wildcard $(PARCEL)/bundle)) --output gpu-report.json

gpu-parcel: $(BOTH)
	rm -rf $(PARCEL)
	mkdir -p $(PARCEL)/wheels
	cp -r $(BOTH) $(PARCEL)/bundle
	$(BIN)/pip download --quiet --no-deps --dest $(PARCEL)/wheels $(GPU_WHEELS)
	cd $(PARCEL)/wheels && for wheel in $$(find . -name '*.whl' -size +60M); do split -b 60M $$wheel $$wheel.part- && rm $$wheel; done

clean:
	rm -rf $(VENV) $(BUNDLE) $(BOTH) $(FEW) $(RESULTS) evaluation.json report.html site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .triton-server
