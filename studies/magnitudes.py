"""The magnitudes of a checkpoint's Q and K: how concentrated they are, and how stable over prompts.

    python -m studies.magnitudes assets/tiny              # on prompts of the recall task (prompts/tasks.py)
    python -m studies.magnitudes Qwen3-8B --data train.jsonl --layers 0 17 35

The model reads --prompts prompts one by one, without gradients and logits; a prompt may fill its context.
Magnitudes are saliency.py's: M[h, d] is the L2 norm over a prompt's tokens, averaged over prompts. They are
measured at both sites: "proj", the outputs of q_proj and k_proj, and "norm", after q_norm and k_norm. The
largest --fraction of each head's dimensions are selected.

Left in --out:

    proj.safetensors    magnitudes at "proj": model.layers.N.self_attn.q_proj (H, D) and .k_proj (Hk, D) fp32;
                        and the selected rows, bool, under the same names with ".selected" appended
    norm.safetensors    the same at "norm"; not of models without q_norm and k_norm (Llama, Qwen2)
    queries.png, keys.png   heads x dimensions of --layers at "proj", each head divided by its largest, with
                        the selected rows marked
    report.html         the table and figures, for a browser
    summary.json        with these keys:
        settings        checkpoint, weights (hash), rope_scaling, dtype, data, prompts, tokens (of all
                        prompts), counted (--tokens), prompt_ids (hash)
        fraction        --fraction; kept: dimensions selected in each head, of head_dim
        chance          kept / head_dim: what every number below would be if all magnitudes were equal, or if
                        rows were drawn at random
        proj, norm      for each site: concentration, the share of the squared magnitude that lies in the
                        selected rows; and stability, the share of one prompt's selected rows that another
                        prompt selects, too, averaged over all pairs of prompts (null for one prompt). Each
                        has q and k, and these have mean (over layers) and layers (a list)
        overlap         the share of proj's selected rows that norm selects, too; q and k likewise. norm and
                        overlap are of models that have the site norm
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

from dataclasses import dataclass
from pathlib import Path

import torch

import saliency
from base import bars, durable, page, plot, run_files
from base.cli import BadInput, one_line_errors, option, parse
from core import hub
from core.checkpoint import load_weights
from evals import stats, subject
from evals.engine import dtype
from model import Qwen3
from prompts import chat, sources, tasks

TOKENS = ["all", "not-first"]  # of saliency.TOKENS; without completions "prompt" is the same as "all"


@dataclass
class Measured:
    """Settings of a measurement, for this script and studies/perturb.py."""

    checkpoint: str = option("", "directory: config.json, safetensors, tokenizer.json", positional=True)
    data: str = option("", "a file of prompts, see prompts/sources.py (default: --task)")
    task: str = option("recall", "without --data: a task of prompts/tasks.py", list(tasks.TASKS))
    facts: int = option(17, "task: facts in a passage", least=1)
    filler: int = option(17, "task: filler sentences in a passage", least=0, most=10**5)
    prompts: int = option(
        32, "prompts to measure on; with --data drawn at random from its rows", least=1, most=10**5
    )
    thinking: bool = option(False, "Qwen3's template with thinking, as train.py has it")
    seed: int = option(0, "seed of the prompts", least=0)
    tokens: str = option("all", "tokens that count: all, or not-first, without the attention sink", TOKENS)
    yarn: float = option(0.0, "YaRN factor (0: as config.json has it)", least=0, most=1e6)
    fraction: float = option(0.3, "share of each head's dimensions that is selected", above=0, most=1)


@dataclass
class Config(Measured):
    layers: list[int] = option([], "layers in the figures (default: four, evenly spaced)", least=0)
    out: str = option("", "directory of the results (default: runs/saliency/<checkpoint's name>)")


# ------------------------------------------------------------------------------------------------ measurement


def read_prompts(config):
    """Measured -> Qwen3Config, prompts (lists of token ids), settings (a dict of all that magnitudes depend
    on). Raises BadInput for a wrong checkpoint, and for prompts that are wrong or longer than its context."""
    if not config.checkpoint:
        raise BadInput("no checkpoint is given; its directory comes before lists like --layers")
    config.checkpoint = hub.local(config.checkpoint)
    model_config, tokenizer, _ = subject.load(config.checkpoint, config.yarn)
    if config.data:
        rows, what = sources.read(config.data, sources.prompt_row), config.data
        source, count = sources.Mixture([rows], [], config.seed), min(config.prompts, len(rows))
    else:
        source = tasks.Source(config.task, f"train {config.seed}", config.facts, config.filler)
        what = f"{config.task}, {config.facts} facts and {config.filler} filler sentences"
        count = config.prompts
    limit = model_config.context_length
    prompts = [chat.encode_prompt(tokenizer, source[i], config.thinking, limit) for i in range(count)]
    settings = {
        **subject.settings(config.checkpoint, model_config),
        "data": what,
        "prompts": count,
        "tokens": sum(map(len, prompts)),
        "counted": config.tokens,
        "prompt_ids": durable.digest(repr(prompts)),
    }
    return model_config, prompts, settings


def load_model(checkpoint, model_config):
    """-> the Qwen3 of a checkpoint directory without gradients, bf16 on a GPU, fp32 on a CPU. model_config
    may have another RoPE scaling than the directory. Raises BadInput."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen3.empty(model_config, getattr(torch, dtype()), device).requires_grad_(False)
    load_weights(model, checkpoint)
    return model


@torch.no_grad()
def measure(model, prompts, site, tokens="all"):
    """Lists of token ids -> for each prompt on its own, saliency.Tracker's magnitudes {name: (H, D) fp32} on
    the CPU. It takes the memory of one prompt."""
    device, measured = next(model.parameters()).device, []
    for prompt in bars.bar(prompts, desc=f"magnitudes, {site}", unit="prompt"):
        ids = torch.tensor([prompt], device=device)
        last = torch.arange(len(prompt), device=device)[None] == len(prompt) - 1
        with saliency.Tracker(model, site, tokens) as tracker:
            model.logprobs(ids, last)  # unlike model(ids): logits of one token only
        measured.append({name: magnitude.cpu() for name, magnitude in tracker.magnitudes().items()})
    return measured


def average(measured):
    """Each prompt's magnitudes -> {name: (H, D)}: their mean, the paper's mean over the batch (section 3)."""
    return {name: torch.stack([each[name] for each in measured]).mean(0) for name in measured[0]}


# ---------------------------------------------------------------------------------------------------- summary


def by_layer(values):
    """{"model.layers.N.self_attn.q_proj": float, ...k_proj...} -> {"q": {"mean": float, "layers": [float,
    ...]}, "k": ...}."""
    result = {}
    for which in "qk":
        layers = [value for name, value in values.items() if name.endswith(f"{which}_proj")]
        result[which] = {"mean": sum(layers) / len(layers), "layers": layers}
    return result


def kept(fraction, head_dim):
    """-> the number of dimensions that are selected in each head."""
    return int(saliency.select_rows({"": torch.zeros(1, head_dim)}, fraction)[".weight"].sum())


def concentration(magnitudes, fraction):
    """Magnitudes {name: (H, D)} -> {name: share of the squared magnitude that lies in the selected rows}."""
    masks = saliency.select_rows(magnitudes, fraction)
    return {name: saliency.selected_share({name: m}, masks).item() for name, m in magnitudes.items()}


def stability(measured, fraction):
    """The magnitudes of each of at least two prompts -> {name: share of one prompt's selected rows that
    another selects, too, averaged over all pairs}."""
    selections = [saliency.select_rows(magnitudes, fraction) for magnitudes in measured]
    result, n = {}, len(measured)
    for name in measured[0]:
        rows = torch.stack([masks[f"{name}.weight"] for masks in selections]).float()  # (n, H * D)
        common = rows @ rows.T  # (n, n) rows that two prompts select; the diagonal is what each selects
        result[name] = ((common.sum() - common.trace()) / (n - 1) / common.trace()).item()
    return result


def overlap(magnitudes, others, fraction):
    """Two dictionaries of magnitudes -> {name: share of the first's selected rows that the second selects,
    too}."""
    result, other_masks = {}, saliency.select_rows(others, fraction)
    for name, magnitude in magnitudes.items():
        masks = saliency.select_rows({name: magnitude}, fraction)
        result[name] = saliency.overlap(masks, other_masks).item()
    return result


def summarize(measured, fraction):
    """{site: each prompt's magnitudes} -> the dictionary of summary.json, without settings."""
    means = {site: average(each) for site, each in measured.items()}
    size = next(iter(means["proj"].values())).size(-1)
    rows = kept(fraction, size)
    summary = {"fraction": fraction, "kept": rows, "head_dim": size, "chance": rows / size}
    for site in measured:
        stable = by_layer(stability(measured[site], fraction)) if len(measured[site]) > 1 else None
        summary[site] = {"concentration": by_layer(concentration(means[site], fraction)), "stability": stable}
    if "norm" in means:
        summary["overlap"] = by_layer(overlap(means["proj"], means["norm"], fraction))
    return summary


def report(summary):
    """The dictionary of summary.json -> a table as text, in per cent: a line for Q and K of each layer."""
    columns = {
        "share": summary["proj"]["concentration"],
        "stability": summary["proj"]["stability"],
    }
    if "norm" in summary:
        columns |= {
            "share, norm": summary["norm"]["concentration"],
            "stability, norm": summary["norm"]["stability"],
            "proj's in norm's": summary["overlap"],
        }
    columns = {name: column for name, column in columns.items() if column}  # one prompt has no stability
    rows = [["layer", *columns]]
    for layer in range(len(columns["share"]["q"]["layers"])):
        for which in "qk":
            numbers = [f"{100 * column[which]['layers'][layer]:.1f}" for column in columns.values()]
            rows.append([f"{layer} {which.upper()}", *numbers])
    for which in "qk":
        numbers = [f"{100 * column[which]['mean']:.1f}" for column in columns.values()]
        rows.append([f"mean {which.upper()}", *numbers])
    return stats.table([*rows, ["chance", *[f"{100 * summary['chance']:.1f}"] * len(columns)]])


# ----------------------------------------------------------------------------------------------------- script


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    model_config, prompts, settings = read_prompts(config)
    layers = model_config.num_hidden_layers
    shown = sorted(set(config.layers)) or sorted({round(i * (layers - 1) / 3) for i in range(4)})
    if shown[-1] >= layers:
        raise BadInput(f"--layers {shown[-1]}: {config.checkpoint} has layers 0 to {layers - 1}")
    name = subject.name(config.checkpoint)
    out = Path(config.out or f"runs/saliency/{name}")
    lock = durable.claim(out, "magnitudes", ["summary.json"])

    model = load_model(config.checkpoint, model_config)
    sites = saliency.SITES if model_config.qk_norm else ("proj",)
    measured = {site: measure(model, prompts, site, config.tokens) for site in sites}

    summary = {"settings": settings, **summarize(measured, config.fraction)}
    for site in sites:
        magnitudes = average(measured[site])
        masks = saliency.select_rows(magnitudes, config.fraction)
        run_files.save_magnitudes(out / f"{site}.safetensors", magnitudes, masks)
    durable.write_json(out / "summary.json", summary)
    for which, file in (("q", "queries.png"), ("k", "keys.png")):
        title = f"{name}: magnitudes of {which.upper()}"
        plot.heads_and_dimensions(out / file, title, out / "proj.safetensors", which, shown)
    length = settings["tokens"] / len(prompts)
    print(f"{config.checkpoint} on {settings['data']}: {len(prompts)} prompts of {length:,.0f} tokens")
    print(f"top {summary['kept']} of {summary['head_dim']} dimensions of each head; per cent\n")
    print(f"{report(summary)}\n")
    figures = [page.image(out / file, file) for file in ("queries.png", "keys.png")]
    page.write(out / "report.html", f"Magnitudes of {name}", page.pre(report(summary)), *figures)
    print(f"results: {out}/summary.json {out}/report.html  figures: {out}/queries.png {out}/keys.png")
