"""Every setting of a training run, with its default and its line of --help, and which exclude each other."""

from dataclasses import dataclass
from pathlib import Path

import dapo
import grpo
import losses
import saliency
from base import processes
from base.cli import BadInput, option
from core import attention, schedule
from core.lora import TARGETS
from core.optimizer import MASTERS, OPTIMIZERS
from prompts import scoring, tasks
from run import roofline, tracker

KV_CACHES = ("auto", "fp8")


@dataclass
class Shared:
    """Settings that train.py and sft.py have in common."""

    data: list[str] = option([], "files of prompts (train.py) or of chats (sft.py), see prompts/sources.py")
    data_rows: list[int] = option([], "rows of each file, drawn by the seed; 0: all (default: all)", least=0)
    data_weights: list[float] = option([], "share of each file among rows drawn (default: one pool)", above=0)
    save_every: int = option(20, "steps between checkpoints; there is one after the last step, too", least=1)
    keep: int = option(2, "newest checkpoints to keep; of 2 one is left should the other be damaged", least=1)
    log_groups: int = option(2, "groups, documents of a step to show in samples.jsonl; -1: all", least=-1)
    tracker: str = option("none", "metrics go to this program, too, see run/tracker.py", tracker.KINDS)
    report_every: int = option(10, "steps between writings of report.html; 0: none is written", least=0)
    resume: str = option("", "go on with the run: auto, from its newest whole checkpoint, or the path of one")
    optimizer: str = option("adamw", "or 8-bit moments, or on the CPU: docs/optimizers.md", list(OPTIMIZERS))
    masters: str = option("fp32", "weights that the optimizer updates; bf16 rounds at random", list(MASTERS))
    max_skips: int = option(3, "updates skipped in a row (not finite); one more ends the run", least=0)
    lora: int = option(0, "LoRA: rank of the update that trains in place of each weight", least=0, most=4096)
    lora_alpha: int = option(32, "LoRA: the update counts alpha / rank times", least=1, most=10**6)
    lora_targets: list[str] = option(TARGETS, "LoRA: which weights have an update", TARGETS)
    checkpointing: bool = option(None, "recompute blocks in backward (default: of more than 4,096 tokens)")
    attention_recompute: bool = option(
        True, "--checkpointing: attention too; --no-...: keep its results, which takes memory (docs/scale.md)"
    )
    flash_attention: int = option(
        2, "kernels on a GPU; 3 needs a Hopper GPU and flash_attn_interface", [2, 3]
    )
    compile: bool = option(False, "norms, rotation, SwiGLU by torch.compile: fewer kernels (docs/scale.md)")
    deterministic: bool = option(False, "the same bits in every run, where possible: docs/interrupted.md")
    plan: bool = option(False, "print the memory and tokens that a step needs on GPUs, and stop")
    dry_run: bool = option(False, "check everything, then one step of a small random model (run/dry_run.py)")
    ranks: int = option(0, "--plan: number of GPUs to plan for (0: as many as torchrun started)", least=0)
    gpu: str = option("", "--plan: the card, for its memory and speed (default: an H100)", roofline.NAMES)
    gpu_memory: float = option(None, "--plan: GB of a card, if not --gpu's; chooses one if none is", above=0)


@dataclass
class Config(Shared):
    # what
    model: str = option(
        "assets/tiny", "checkpoint to start from: a directory, or ORG/NAME on the Hugging Face hub"
    )
    name: str = option("", "name of the run; results go to runs/<name> (default: date and time)")
    truncate_prompts: bool = option(False, "cut the middle out of prompts that are too long, or drop them")
    eval_data: list[str] = option([], "files of held-out prompts, evaluated before and after (default: none)")
    reward: list[str] = option(
        ["rewards:exact"],
        "module:function; (answer text, row) -> float, 1.0 is correct. Accuracy: the first's",
    )
    reward_weights: list[float] = option(
        [], "weights of several rewards in their sum (default: 1 each)", least=-1e6, most=1e6
    )
    reward_workers: int = option(
        0, "processes of each rank that score answers (0: itself)", least=0, most=1024
    )
    reward_timeout: float = option(0.0, "seconds to score an answer (0: any)", least=0)
    reward_on_timeout: str = option("stop", "then save and stop, or score it zero", ["stop", "zero"])
    thinking: bool = option(False, "the model thinks first; the answer follows </think>")
    task: str = option(
        "recall", "without --data: recall, tracking or chain, see prompts/tasks.py", list(tasks.TASKS)
    )
    facts: int = option(17, "task: facts in a passage")
    filler: int = option(17, "task: filler sentences in a passage", least=0, most=10**5)
    # The seed's limit: vLLM gets it times 2^32.
    seed: int = option(0, "seed of prompts, sampling and random rows", least=0, most=2**31 - 1)
    # how much
    steps: int = option(60, "training steps, each one rollout", least=1)
    prompts: int = option(16, "groups (prompts) a step trains on, over all ranks", least=1, most=10**5)
    completions: int = option(16, "G, completions per prompt", least=2, most=10**4)
    updates: int = option(1, "optimizer updates per rollout; each takes prompts / updates groups", least=1)
    context: int = option(0, "maximum length of prompt and completion, tokens (0: the model's)", least=0)
    max_completion: int = option(24, "maximum completion length, tokens", least=1)
    eval_before: bool = option(True, "evaluate the starting model too")
    eval_completions: int = option(
        1, "completions of a held-out prompt at temperature 1", least=1, most=10**4
    )
    eval_every: int = option(
        0, "steps between held-out evaluations, see best/ in docs/run.md; 0: none", least=0
    )
    best: str = option("", "--eval-every: SET/KEY that best/ goes by (default: the first set's accuracy)")
    eval_prompts: int = option(256, "task: held-out prompts, before and after", least=0, most=10**5)
    eval_filler: list[int] = option([], "task: filler held out (default: --filler)", least=0, most=10**5)
    # the algorithm
    algorithm: str = option("dapo", "docs/algorithms.md lists what belongs to each", list(losses.EPSILONS))
    # vLLM's limits: it refuses more, and samples at 0.01 what is below.
    temperature: float = option(1.0, "of sampling and of the trainer's log-probs", least=0.01, most=2)
    epsilon_low: float = option(0.0, "ratio clipping below 1 (0: the algorithm's own)", least=0)
    epsilon_high: float = option(0.0, "ratio clipping above 1 (0: the algorithm's own)", least=0)
    dual_clip: float = option(10.0, "dapo, grpo: for A < 0 the loss is at most this times |A|", above=1)
    normalize_std: bool = option(True, "divide advantages by the group's standard deviation (no: Dr. GRPO)")
    aggregation: str = option("sequence", "grpo only; the others have their own", list(grpo.AGGREGATIONS))
    beta: float = option(0.0, "grpo only: weight of the KL term to the start (GRPO's paper 0.04)", least=0)
    max_rounds: int = option(10, "dynamic sampling: most rounds of prompts to fill a batch", least=1)
    oversample: float = option(
        1.0, "dynamic sampling: the first round draws this times --prompts, rounded up", least=1, most=10
    )
    underfull: str = option(
        "train", "a batch not full by then: train on its groups, or stop", ["train", "stop"]
    )
    overlong_cache: int = option(4, "dapo: last tokens, over which overlong punishment grows to -1", least=0)
    importance_cap: float = option(2.0, "cap of the weights pi_old / pi_sampler of tokens; 0: none", least=0)
    # LongAct
    rule: str = option("top", "rows to update: top is LongAct, all is dense", list(saliency.RULES))
    fraction: float = option(0.3, "share of each head's dimensions selected (paper: 0.3)", above=0, most=1)
    site: str = option("proj", "at the projections, or after their norms (Qwen3)", list(saliency.SITES))
    saliency_tokens: str = option("all", "tokens that count, see docs/paper.md", list(saliency.TOKENS))
    unselected: str = option("grad", "other rows: masked by gradient, or frozen", list(saliency.UNSELECTED))
    # the optimizer
    learning_rate: float = option(
        None, "AdamW's, after warm-up (default: by size, docs/run.md)", above=0, most=1
    )
    warmup: int = option(10, "steps of linear warm-up", least=0)
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay; moves masked rows too", least=0)
    adam_beta2: float = option(0.999, "AdamW's second-moment decay")
    max_grad_norm: float = option(1.0, "gradient norm to clip at, after masking", above=0)
    # the machine
    mismatch_limit: float = option(0.0, "largest mismatch_mean (0: 0.001 in fp32, 0.1 in bf16)", least=0)
    tensor_parallel: int = option(1, "ranks that share one vLLM engine", least=1)
    find: bool = option(False, "--plan: what fits, for every size of Qwen3 on 1 to 8 cards of three kinds")
    vllm_share: float = option(0.5, "share of GPU memory for vLLM; freed while training", above=0, most=1)
    kv_cache: str = option("auto", "vLLM's keys and values: as computed, or fp8, half as large", KV_CACHES)
    vllm_offload_graphs: bool = option(False, "CUDA graphs of vLLM go to the CPU's memory while training")
    tokens_per_pass: int = option(8192, "completion tokens that train at once; sets peak memory", least=1)
    context_parallel: int = option(1, "ranks that share a group's tokens, for very long prompts", least=1)
    replicate: int = option(0, "copies of the weights, each sharded over its ranks (0: one a node)", least=0)


# What may differ when a run goes on: its place, its length, what decides whether it ends, and what changes
# nothing but rounding. Files of model and data are compared by their contents (resume.settings).
MAY_CHANGE = (
    "name model data eval_data reward_workers reward_timeout reward_on_timeout steps save_every keep "
    "log_groups resume report_every max_skips max_rounds underfull eval_before eval_every mismatch_limit "
    "tensor_parallel deterministic vllm_share vllm_offload_graphs tokens_per_pass checkpointing "
    "attention_recompute flash_attention compile context_parallel replicate plan dry_run ranks gpu find "
    "gpu_memory tracker"
).split()


def of_engine(config, dtype, world):
    """train.py's Config, the dtype to compute in, the number of ranks -> the arguments of rollout.Rollout."""
    prompts = dapo.first_round(config.prompts, config.oversample)
    engines = world // config.tensor_parallel
    return {
        "checkpoint": config.model,
        "context_length": config.context,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": config.seed,
        "tensor_parallel": config.tensor_parallel,
        "share": config.vllm_share,
        "sequences": schedule.sequences(prompts, config.completions, engines),
        "kv_cache": config.kv_cache,
        "offload_graphs": config.vllm_offload_graphs,
    }


def check(config, world, cuda):
    """Raises BadInput for settings that contradict each other or the number of ranks."""
    if config.find and not config.plan:
        raise BadInput("--find is for --plan: give both")
    if world % config.context_parallel:
        raise BadInput(f"--context-parallel {config.context_parallel} does not divide the {world} ranks")
    if config.replicate and world % config.replicate:
        raise BadInput(f"--replicate {config.replicate} does not divide the {world} ranks")
    groups_per_update, uneven = divmod(config.prompts, config.updates)
    workers = world // config.context_parallel
    if uneven or groups_per_update % workers:
        who = f"context groups of {config.context_parallel} ranks" if config.context_parallel > 1 else "ranks"
        raise BadInput(
            f"--prompts {config.prompts} cannot be shared: {config.updates} updates x {workers} {who} need a "
            f"multiple of {config.updates * workers}"
        )
    how = config.reward_workers, config.reward_timeout, config.reward_on_timeout
    scoring.check(config.reward, *how, config.reward_weights)
    if Path(config.name).is_absolute() or ".." in Path(config.name).parts:
        raise BadInput(f"--name {config.name} is not below runs/, where all runs of train.py go")
    check_shared(config, "--name NAME --resume auto")
    if config.lora and not {"q_proj", "k_proj"} <= set(config.lora_targets):
        what = "whose rows train.py measures and masks"
        raise BadInput(f"--lora-targets {' '.join(config.lora_targets)}: add q_proj and k_proj, {what}")
    if config.resume and not config.name:
        raise BadInput(f"--resume {config.resume} needs the --name of the run that goes on")
    if world % config.tensor_parallel:
        raise BadInput(f"--tensor-parallel {config.tensor_parallel} does not divide the {world} ranks")
    if config.tensor_parallel > 1 and not cuda and not config.plan:
        raise BadInput(f"--tensor-parallel {config.tensor_parallel} needs a GPU per rank, and there is none")
    for flag, given in (
        ("--kv-cache fp8", config.kv_cache),
        ("--vllm-offload-graphs", config.vllm_offload_graphs),
    ):
        if given not in ("auto", False) and not cuda and not config.plan:
            raise BadInput(f"{flag} needs a GPU, and there is none")
    if (config.data_rows or config.data_weights or config.truncate_prompts) and not config.data:
        raise BadInput("--data-rows, --data-weights and --truncate-prompts need --data")
    if config.eval_data and not config.data:
        raise BadInput("--eval-data needs --data; --task makes its own held-out prompts")
    if config.eval_filler and config.data:
        raise BadInput("--eval-filler applies only to --task; with --data give held-out files by --eval-data")
    held_out = config.eval_data or (config.eval_prompts and not config.data)
    if config.eval_every and not held_out:
        raise BadInput("--eval-every needs held-out prompts: --eval-data, or a task's --eval-prompts")
    if config.best and not config.eval_every:
        raise BadInput("--best needs --eval-every: it is what best/ goes by")
    if config.oversample > 1 and config.algorithm not in losses.DYNAMIC_SAMPLING:
        what = f"{config.algorithm} trains on every group that it draws"
        raise BadInput(
            f"--oversample {config.oversample:g} needs dynamic sampling (--algorithm dapo): {what}"
        )
    if config.beta and config.algorithm != "grpo":
        raise BadInput(f"--beta needs --algorithm grpo: {config.algorithm} has no KL term")
    if config.aggregation != Config.aggregation and config.algorithm != "grpo":
        raise BadInput(f"--aggregation needs --algorithm grpo: {config.algorithm} has a mean of its own")
    if config.dual_clip != Config.dual_clip and config.algorithm not in ("grpo", "dapo"):
        raise BadInput(f"--dual-clip is not for --algorithm {config.algorithm}: it has no dual clip")
    if config.algorithm != "dapo" and config.overlong_cache != Config.overlong_cache:
        raise BadInput(f"--overlong-cache needs --algorithm dapo: {config.algorithm} does not shape rewards")
    if config.algorithm == "dapo" and config.overlong_cache > config.max_completion:
        what = (
            f"--overlong-cache {config.overlong_cache} is more than --max-completion {config.max_completion}"
        )
        raise BadInput(f"{what}: it is the last of those tokens; 0 for no punishment")
    if config.algorithm in losses.NEED_UPDATES and config.updates == 1:
        raise BadInput(
            f"--algorithm {config.algorithm} needs --updates 2 or more: with 1 every ratio is 1, and it is a "
            "plain policy gradient (--algorithm grpo)"
        )
    if not losses.EPSILONS[config.algorithm] and (config.epsilon_low or config.epsilon_high):
        what = "--epsilon-low and --epsilon-high are not for"
        raise BadInput(f"{what} --algorithm {config.algorithm}: it does not clip")


def check_shared(config, resume_flags):
    """Raises BadInput for what train.py and sft.py refuse alike. resume_flags: with which a run goes on."""
    if config.ranks and not config.plan:
        what = "torchrun --nproc-per-node says how many ranks train"
        raise BadInput(f"--ranks {config.ranks} is for --plan; {what}")
    if not 0 <= config.adam_beta2 < 1:
        raise BadInput(f"--adam-beta2 must be in [0, 1), not {config.adam_beta2}")
    if config.flash_attention == 3 and not config.plan:
        attention.use_flash_attention_3()
    if not config.lora and (config.lora_alpha, config.lora_targets) != (32, TARGETS):
        raise BadInput("--lora-alpha and --lora-targets need --lora RANK")
    tracker.check(config.tracker)
    processes.check_restarts(config.resume, resume_flags)
