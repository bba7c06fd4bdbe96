"""magnitudes.py, clamp.py and perturb.py: statistics worked by hand, clamps and their files, scripts and
refusals."""

import json

import pytest
import torch
from conftest import FAMILIES, ROOT, make_small, python, refusal, run_here
from safetensors.torch import load_file, save_file

import saliency
from base import interrupt
from base.cli import BadInput
from evals import clamp, subject
from evals.engine import GREEDY
from evals.results import Results
from model import Qwen3Config
from prompts import rewards
from studies import magnitudes

TINY = ROOT / "assets" / "tiny"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


# ------------------------------------------------------------------------------------------------- statistics


def test_prompts_are_measured_one_by_one_and_averaged(small):
    prompts = [list(range(5, 60)), list(range(3, 10)), [1, 2]]
    for site in saliency.SITES:
        measured = magnitudes.measure(small, prompts, site)
        with saliency.Tracker(small, site) as tracker:
            for prompt in prompts:
                small(torch.tensor([prompt]))
        together = tracker.magnitudes()
        for name, mean in magnitudes.average(measured).items():
            torch.testing.assert_close(mean, together[name])
        assert len(measured) == 3 and not torch.allclose(measured[0][Q], measured[1][Q])


def test_concentration_stability_and_overlap_by_hand():
    even, steep = torch.ones(2, 10), torch.tensor([[10.0, 9, 8, *[1.0] * 7], [*[0.0] * 7, 1, 2, 2]])
    shares = magnitudes.concentration({Q: even, K: steep}, 0.3)
    assert shares == {Q: pytest.approx(0.3), K: pytest.approx((100 + 81 + 64 + 1 + 4 + 4) / (245 + 7 + 9))}
    # Selections 012, 012 and 234 of ten: the pairs have 3, 1 and 1 of 3 rows in common.
    prompts = [
        {Q: torch.zeros(1, 10).index_fill(1, torch.tensor(rows), 1.0)}
        for rows in ([0, 1, 2], [0, 1, 2], [2, 3, 4])
    ]
    assert magnitudes.stability(prompts, 0.3) == {Q: pytest.approx((3 + 1 + 1) / 9)}
    assert magnitudes.overlap(prompts[0], prompts[2], 0.3) == {Q: pytest.approx(1 / 3)}


def test_without_structure_everything_is_chance():
    random = torch.Generator().manual_seed(0)
    measured = [
        {Q: torch.rand(32, 128, generator=random), K: torch.rand(8, 128, generator=random)} for _ in range(20)
    ]
    summary = magnitudes.summarize({"proj": measured, "norm": [*reversed(measured[:1]), *measured[1:]]}, 0.3)
    assert (summary["kept"], summary["head_dim"], summary["chance"]) == (38, 128, 38 / 128)
    assert summary["proj"]["stability"]["q"]["mean"] == pytest.approx(38 / 128, abs=0.01)
    assert summary["overlap"]["k"] == {"mean": 1.0, "layers": [1.0]}


def test_the_script_of_saliency_py(tmp_path):
    rows = [{"prompt": "What is the code for Max? " * n, "answer": ""} for n in (3, 30, 300)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [TINY, "--data", tmp_path / "prompts.jsonl", "--layers", 2, 0, "--out", tmp_path / "out"]
    printed = run_here("studies/magnitudes.py", *arguments)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"]["prompts"] == 3 and summary["settings"]["tokens"] > 333 * 7
    assert summary["kept"] == 9 and len(summary["proj"]["concentration"]["q"]["layers"]) == 3
    for site in saliency.SITES:
        tensors = load_file(tmp_path / "out" / f"{site}.safetensors")
        assert (
            tensors[Q].shape == (8, 32)
            and (tensors[f"{K}.selected"].sum(1) == 9).all()
            and len(tensors) == 12
        )
    assert f"{100 * summary['overlap']['k']['mean']:.1f}" in printed
    for name in ("queries.png", "keys.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"


def test_a_model_without_norms_has_one_site(tmp_path):
    make_small(**FAMILIES["llama"], vocab_size=896).save_pretrained(tmp_path / "c", companions_from=TINY)
    out, how = tmp_path / "out", ("--prompts", 2, "--facts", 3, "--filler", 0, "--layers", 0)
    run_here("studies/magnitudes.py", tmp_path / "c", *how, "--out", out)
    summary = json.loads((out / "summary.json").read_text())
    assert "proj" in summary and not {"norm", "overlap"} & summary.keys()
    assert (out / "proj.safetensors").exists() and not (out / "norm.safetensors").exists()
    assert "which has no q_norm" in refusal("train.py", "--model", tmp_path / "c", "--site", "norm")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no checkpoint is given"),
        ([TINY, "--fraction", 1.5], "--fraction must be at most 1"),
        ([TINY, "--layers", 1, 3], "--layers 3: "),
        ([TINY, "--facts", 40, "--filler", 900], "the context leaves 4096"),
        ([TINY, "--data", "none.jsonl"], "none.jsonl cannot be read"),
    ],
)
def test_saliency_py_refuses(arguments, message):
    assert message in refusal("studies/magnitudes.py", *arguments)


# ----------------------------------------------------------------------------------------------------- clamps


def measured(model, prompts):
    with clamp.Means(model) as means:
        magnitude = magnitudes.average(magnitudes.measure(model, prompts, "proj"))
    return magnitude, means.values


def test_the_global_mean_is_over_all_tokens_heads_and_dimensions(small):
    prompts = [list(range(20, 60)), [1, 2, 3]]
    _, means = measured(small, prompts)
    block, outputs = small.model.layers[0], []
    for prompt in prompts:  # the first layer's input is the embedding
        x = block.input_layernorm(small.model.embed_tokens(torch.tensor(prompt)))
        outputs.append(x @ block.self_attn.k_proj.weight.T)
    assert means[K] == pytest.approx(torch.cat(outputs).mean().item(), abs=1e-7)
    assert len(means) == 4 and not small.model.layers[0].self_attn.k_proj._forward_hooks


def test_a_clamp_holds_the_chosen_dimensions_of_each_head_at_its_projections_mean(small):
    magnitude, means = measured(small, [list(range(20, 60))])
    for rule in ("top", "bottom", "random"):
        chosen = clamp.choose(magnitude, means, 0.3, rule, torch.Generator().manual_seed(0))
        for name, values in chosen.items():
            held = ~values.view(-1, 16).isnan()
            assert held.sum(1).tolist() == [4] * len(held) and torch.all(
                values[held.flatten()] == torch.tensor(means[name])
            )
            others = (
                magnitude[name].masked_fill(held, torch.inf).amin(1),
                magnitude[name].masked_fill(held, 0).amax(1),
            )
            if rule == "top":
                assert torch.all(magnitude[name].masked_fill(~held, torch.inf).amin(1) >= others[1])
            if rule == "bottom":
                assert torch.all(magnitude[name].masked_fill(~held, 0).amax(1) <= others[0])
    assert all(values.isnan().all() for values in clamp.choose(magnitude, means, 0.3, "untouched").values())


def test_clamp_files_say_how_they_were_chosen_and_others_are_refused(tmp_path):
    small = make_small()
    magnitude, means = measured(small, [[1, 2, 3]])
    digests = set()
    for rule in ("top", "bottom"):
        chosen = clamp.choose(magnitude, means, 0.3, rule)
        clamp.save(tmp_path / rule, chosen, {"rule": rule})
        loaded, about = clamp.load(tmp_path / rule, small.config)
        digests.add(about.pop("values"))
        assert about == {"rule": rule}
        assert all(
            torch.equal(loaded[name].nan_to_num(9), values.nan_to_num(9)) for name, values in chosen.items()
        )
    assert len(digests) == 2
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    (tmp_path / "text").write_text("no tensors")
    for name, message in (("none", "cannot be read"), ("text", "cannot be read"), ("other", "is no clamp")):
        with pytest.raises(BadInput, match=message):
            clamp.load(tmp_path / name, small.config)
    with pytest.raises(BadInput, match="other layers or heads"):
        clamp.load(tmp_path / "top", Qwen3Config.from_pretrained(TINY))
    with pytest.raises(BadInput, match="--tensor-parallel 1, not 2"):
        subject.load_clamp(tmp_path / "top", small.config, 2)


def test_perturb_py_makes_clamps_runs_evaluations_and_reports(tmp_path, monkeypatch):
    """Its evaluations, finished beforehand by hand, report again under its clamps: no engine, but all
    else."""

    run = interrupt.run
    monkeypatch.setattr(interrupt, "run", lambda command, **how: run(python(*command[1:]), **how))

    def perturb(*arguments):
        return run_here("studies/perturb.py", TINY, "--prompts", 2, "--out", tmp_path, *arguments)

    with pytest.raises(BadInput, match="write an evaluation after --"):
        perturb("--", "eval_nothing.py")
    with pytest.raises(BadInput, match=r"eval_data.py with untouched ended with exit code 1"):
        perturb("--", "eval_data.py", "--samples", -1)
    config = Qwen3Config.from_pretrained(TINY)
    scores = {
        "untouched": [1, 1, 1, 0],
        "bottom": [1, 1, 0, 0],
        "random-0": [1, 0, 0, 0],
        "top": [0, 0, 0, 0],
    }
    source = {spec: digest[:16] for spec, digest in rewards.source_digests(["rewards:exact"]).items()}
    for name, values in scores.items():
        _, about = clamp.load(tmp_path / f"{name}.safetensors", config)
        assert (about["rule"], about["draw"], about["fraction"]) == (name.partition("-")[0], 0, 0.3)
        settings = {
            "benchmark": "tasks.py",
            **subject.settings(TINY, config, about),
            **{"task": "recall", "facts": 17, "filler": 17},
            **{
                "reward": ["rewards:exact"],
                "reward_source": source,
                "thinking": False,
                "truncate_prompts": False,
            },
            **{"sampling": GREEDY, "samples": 4, "max_tokens": 24, "seeds": 1},
        }
        wanted = {(f"recall-held out-{i}", 0): ("recall", 34) for i in range(4)}
        results = Results(tmp_path / "1-data" / name, settings, wanted)
        for (key, seed), score in zip(wanted, values):
            record = {
                "id": key,
                "task": "recall",
                "length": 34,
                "seed": seed,
                "score": float(score),
                "expected": "x",
            }
            record |= {
                "prediction": f"{name} {key[-1]}",
                "prompt_tokens": 335,
                "completion_tokens": 9,
                "finished": True,
                "rewards": [float(score)],
                "rewards_timed_out": False,
            }
            results.write(record)
        del results  # and with it the directory's lock
    table = perturb("--", "eval_data.py", "--samples", 4)
    lines = {line.split()[0]: line.split()[1:] for line in table.splitlines() if "[-]" in line}
    assert lines["untouched"] == ["75.0", "[-]", "100%", "-", "-", "-"]
    assert lines["random-0"] == ["25.0", "[-]", "33%", "-50.0", "too", "few", "samples", "0.5"]
    assert (
        lines["top"][:4] == ["0.0", "[-]", "0%", "-75.0"]
        and "25% of the completions are 'top 0'" in table
        and "108" in table
    )
    [entry] = json.loads((tmp_path / "perturbation.json").read_text())
    assert [row["score"] for row in entry["rows"]] == [0.75, 0.5, 0.25, 0.0] and entry["rows"][3]["kept"] == 0
    with pytest.raises(BadInput, match="holds clamps of other settings: fraction 0.3 there, 0.4 here"):
        perturb("--fraction", 0.4)
