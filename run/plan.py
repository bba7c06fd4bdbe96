"""What a training step takes, before there is a GPU: bytes by line, seconds, and the cheapest flags that fit.

    python train.py --plan --model Qwen3-8B --ranks 8 --gpu-memory 80 --context 32768 --max-completion 4096
    python train.py --plan --find               # every size of Qwen3, on 1 to 8 cards of 24, 48 and 80 GB
    python sft.py --plan --data chats.jsonl --model Qwen3-8B-Base --ranks 8 --context 16384 --checkpointing

--model is a checkpoint directory, of which only config.json is read, or the name of a published size. The
plan is for the worst that can come: a prompt of --context less --max-completion tokens, completions that fill
a pass; in sft.py a full pass all of which the assistant says.

Here is the text. Bytes are counted in run/memory_plan.py, seconds in run/roofline.py, the flags that fit are
found in run/find.py.
"""

from pathlib import Path

from base.cli import BadInput
from core.checkpoint import Qwen3Config
from core.optimizer import bytes_per_parameter
from core.parallel import check_heads
from run import find, roofline
from run.memory_plan import GIB, Step, reserve, trained_parameters
from run.preflight import prompt_room

PAPER = 4096  # tokens of a completion for --find, unless --max-completion is given


def model_and_context(config):
    """-> Qwen3Config of config.model, and the longest sequence. Raises BadInput for a model that is neither a
    directory nor a published size, and for a context beyond it."""
    if Path(config.model).exists():
        c = Qwen3Config.from_pretrained(config.model)
    else:
        try:
            c = Qwen3Config.preset(Path(config.model).name.removeprefix("Qwen3-"))
        except BadInput as error:
            raise BadInput(f"--model {config.model} is no directory, and {error}") from error
    return c, c.context(config.context, config.model)


def gib(value):
    return f"{value / GIB:9.2f} GiB"


def memory_table(lines):
    """{line: bytes} -> lines of text, the last their sum."""
    shown = {**{line: value for line, value in lines.items() if value}, "total": sum(lines.values())}
    return [f"  {line:48}{gib(value)}" for line, value in shown.items()]


def training_table(weighed):
    recomputed = ", blocks recomputed (--checkpointing)" if weighed.step.checkpointing else ""
    title = f"training, one rank, at its worst moment ({weighed.moment}){recomputed}:"
    return [title, *memory_table(weighed.lines)]


def gpus(ranks):
    return f"{ranks} GPU{'s' if ranks > 1 else ''}"


def verdict(card, over):
    """over: bytes too much."""
    left = f"of which {reserve(card.memory) / GIB:.1f} stay free"
    says = "yes" if over <= 0 else f"NO, {over / GIB:.1f} GiB too much"
    return f"fits {card.memory:g} GiB (a card of {card.sold:g} GB), {left}: {says}"


def short(seconds):
    return f"{seconds:.{2 if seconds < 1 else 1 if seconds < 10 else 0}f} s"


def listed(kinds):
    """{kind of work: seconds} -> text."""
    return ", ".join(f"{kind} {short(each)}" for kind, each in kinds.items())


def ladder(c, step, card, samples=True):
    """Lines of text: what was tried until something fitted, and the flags for that."""
    text = [f"what fits, what changes least first:{'training':>24}"]
    text[0] += f"{'rollout':>13}{'train':>10}{'sample':>9}" if samples else ""
    for rung, found in find.ladder(c, step, card, samples):
        says = "fits" if found.over <= 0 else f"{found.over / GIB:.1f} GiB too much"
        sizes = f"{sum(found.lines.values()) / GIB:9.1f} GiB"
        if samples:
            sizes += (
                f"{(found.asleep + found.share) / GIB:9.1f} GiB{short(roofline.total(found.training)):>10}"
            )
            sizes += f"{short(sum(found.sampling.values())):>9}"
        text.append(f"  {rung:46}{sizes}   {says}")
    if found.over > 0:
        return [*text, "nothing fits: use more GPUs (--ranks), larger ones (--gpu), or a smaller model"]
    changed = find.flags(step, found.step)
    text.append(f"cheapest: {'add ' + changed if changed else 'the flags that you gave'}")
    host = bytes_per_parameter(found.step.optimizer, found.step.masters).host
    if host:
        host *= trained_parameters(c, found.step.lora) * found.step.replicate / GIB
        text.append(f"and {host:.1f} GiB of the CPUs' memory, over all ranks")
    return text


def sft_report(config, ranks):
    """The text of sft.py --plan. Raises BadInput as `model_and_context`."""
    c, context = model_and_context(config)
    card, step = roofline.card_of(config.gpu, config.gpu_memory), Step.of_sft(config, ranks, context)
    weighed = find.weigh(c, step, card)
    text = [
        f"SFT of {config.model} on {gpus(ranks)}: {config.batch} documents of up to {context:,} tokens a "
        f"step, {step.pass_tokens:,} tokens in the fullest pass",
        "",
        *training_table(weighed),
        verdict(card, weighed.over_training),
        "",
        *ladder(c, step, card, samples=False),
    ]
    return "\n".join(text) + "\n"


def report(config, ranks):
    """The text of train.py --plan. Raises BadInput as `model_and_context`, and for no room for a prompt."""
    if config.find:
        given = config.max_completion != type(config).max_completion
        return find.table(config.completions, config.max_completion if given else PAPER)
    c, context = model_and_context(config)
    prompt_room(context, config.max_completion)
    check_heads(config.context_parallel, c)
    card, step = roofline.card_of(config.gpu, config.gpu_memory), Step.of(config, ranks, context)
    weighed, G, R = find.weigh(c, step, card), step.completions, step.completion
    shared, unshared = step.prompts * (step.prompt + G * R), step.prompts * G * (step.prompt + R)
    cache = f"{gib(weighed.room)}   a group takes {weighed.engine.group / GIB:.2f} GiB"
    training, sampling = roofline.total(weighed.training), sum(weighed.sampling.values())
    text = [
        f"{config.model} on {gpus(ranks)}: {step.prompts} prompts of {step.prompt:,} tokens x {G} "
        f"completions of up to {R:,}, {step.pass_tokens:,} completion tokens in the fullest pass",
        "",
        *training_table(weighed),
        "rollout, one rank:",
        f"  {'weights and moments, as above':48}{gib(weighed.asleep)}",
        f"  {'vLLM weights (bf16)':48}{gib(weighed.engine.weights)}",
        f"  {'vLLM activations and graphs':48}{gib(weighed.engine.working)}",
        f"  {'vLLM KV cache (what --vllm-share leaves)':48}{cache}",
        f"  {'total':48}{gib(weighed.asleep + weighed.share)}",
        verdict(card, weighed.over),
        "",
        f"tokens through the network a step: {shared:,}; with the prompt once per completion {unshared:,} "
        f"({unshared / shared:.1f} times as many)",
        f"training {short(training)} a step: {listed(weighed.training)}",
        f"sampling {short(sampling)} a round: {listed(weighed.sampling)}",
        *roofline.assumptions(card),
        "",
        "   context   training   rollout   KV of a group   fewer tokens    train   sample   fits",
    ]
    for context in filter(lambda context: context > R, find.CONTEXTS):
        text.append(context_line(c, find.weigh(c, Step.of(config, ranks, context), card)))
    return "\n".join([*text, "", *ladder(c, step, card)]) + "\n"


def context_line(c, weighed):
    """A line of the table by contexts."""
    step = weighed.step
    training, rollout = sum(weighed.lines.values()) / GIB, (weighed.asleep + weighed.share) / GIB
    times = step.completions * step.context / (step.prompt + step.own)
    says = f"{'yes' if weighed.over <= 0 else 'NO'}{', but needs YaRN' * (step.context > c.context_length)}"
    sizes = f"{training:6.1f} GiB {rollout:5.1f} GiB{weighed.engine.group / GIB:12.2f} GiB{times:12.1f} x"
    timed = f"{short(roofline.total(weighed.training)):>9}{short(sum(weighed.sampling.values())):>9}"
    return f"{step.context:10,} {sizes}{timed}   {says}"
