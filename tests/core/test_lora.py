"""core/lora.py against the dense model with the merged weights, autograd, transformers, PEFT, and vLLM's
reader of adapters."""

import pytest
import torch
import transformers
from conftest import FAMILIES, ROOT, make_small, output_of, refusal
from safetensors.torch import load_file, save_file

from base.cli import BadInput
from core import lora
from model import Qwen3, logprobs_in_passes
from run import config, resume
from saliency import Tracker, mask_gradients, masked_step, select_rows

TINY = ROOT / "assets" / "tiny"
PROMPT = torch.arange(3, 20)
COMPLETIONS = [torch.tensor([5, 9, 2]), torch.tensor([7]), torch.arange(30, 37)]
PASSES = [[0, 2], [1]]


def trained(tmp_path, targets=lora.TARGETS, rank=3, **shape):
    """A model with an update that is not 0, of a checkpoint that is written to tmp_path/base."""
    make_small(**shape).save_pretrained(tmp_path / "base", companions_from=TINY)
    settings = lora.Settings(rank, 6, tuple(targets), seed=7)
    model = Qwen3.from_pretrained(tmp_path / "base", low_rank=settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def dense(model):
    """The model with merged weights, all of which train, by arithmetic of its own in float64."""
    other = Qwen3.empty(model.config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            stem = name.removesuffix("weight")  # a bias has none
            A, B = (parameters.get(f"{stem}lora_{factor}.weight") for factor in "AB")
            update = 0 if A is None else 6 / 3 * (B.double() @ A.double())
            parameter.copy_(parameters[name].double() + update)
    return other


def backward(model, checkpointing=False):
    """Gradients of a loss of the group, in two stages -> log-probabilities, magnitudes."""
    model.checkpointing, values = checkpointing, []
    with Tracker(model) as tracker:
        prompt = model.read(PROMPT)
        leaves = prompt.detach()
        for part in PASSES:
            logprobs, entropies = model.completion_logprobs(leaves, [COMPLETIONS[i] for i in part], 1.3)
            (logprobs.square().sum() + entropies.sum()).backward()
            values.append(logprobs.detach())
        prompt.backward(leaves)
    return torch.cat(values), tracker.magnitudes()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_gradients_and_masks_are_those_of_the_merged_weights(family, checkpointing, tmp_path):
    """With G the gradient of the merged weight, A's is scale B^T G and B's is scale G A^T. Of sums of some
    hundred products in fp32, in another order."""
    model = trained(tmp_path, tied=family == "qwen3", **FAMILIES[family])
    reference = dense(model)
    values, magnitudes = backward(model, checkpointing)
    expected, expected_magnitudes = backward(reference)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    for name, magnitude in expected_magnitudes.items():
        torch.testing.assert_close(magnitudes[name], magnitude, rtol=1e-5, atol=1e-6)
    masks, expected_masks = (select_rows(each) for each in (magnitudes, expected_magnitudes))
    mask_gradients(model, masks)
    parameters, seen = dict(model.named_parameters()), 0
    for name, weight in reference.named_parameters():
        stem = name.removesuffix("weight")
        assert parameters[name].grad is None, name
        if stem + "lora_A.weight" not in parameters:
            continue
        A, B = parameters[stem + "lora_A.weight"], parameters[stem + "lora_B.weight"]
        torch.testing.assert_close(A.grad, 2 * B.detach().T @ weight.grad, rtol=1e-4, atol=1e-4)
        rows = expected_masks.get(name, torch.ones(len(weight), dtype=torch.bool))
        torch.testing.assert_close(
            B.grad, 2 * weight.grad @ A.detach().T * rows[:, None], rtol=1e-4, atol=1e-4
        )
        assert not B.grad[~rows].any()
        seen += 1
    assert seen == 2 * 7


def test_a_new_model_is_its_checkpoint_and_has_peft_s_start(tmp_path):
    model, start = trained(tmp_path, rank=16), make_small()
    torch.testing.assert_close(model(PROMPT[None]), dense_logits := model(PROMPT[None]), rtol=0, atol=0)
    fresh = Qwen3.from_pretrained(tmp_path / "base", low_rank=lora.Settings(16))
    assert torch.equal(fresh(PROMPT[None]), start(PROMPT[None]))
    assert not torch.equal(dense_logits, start(PROMPT[None]))
    for name, parameter in fresh.named_parameters():
        if "lora_B" in name:
            assert not parameter.any()
        elif "lora_A" in name:
            bound = parameter.size(1) ** -0.5
            assert parameter.abs().max() <= bound
            # The standard error of the deviation of n uniform numbers is 0.45 / sqrt(n) of it.
            tolerance = 5 * 0.45 / parameter.numel() ** 0.5
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=tolerance)
        assert parameter.requires_grad == ("lora_" in name)


def test_the_reference_is_the_model_without_its_update_and_no_tracker_sees_it(tmp_path):
    model, start = trained(tmp_path), make_small()
    with Tracker(model) as tracker:
        values = logprobs_in_passes(lora.Base(model), PROMPT, COMPLETIONS, PASSES, 1.3)
        assert tracker.norms is None and model.tracker is tracker
    for value, expected in zip(values, logprobs_in_passes(start, PROMPT, COMPLETIONS, PASSES, 1.3)):
        assert torch.equal(value, expected)
    own = logprobs_in_passes(model, PROMPT, COMPLETIONS, PASSES, 1.3)
    assert not any(torch.equal(a, b) for a, b in zip(values, own))


@pytest.mark.parametrize("unselected", ["grad", "frozen"])
def test_rows_that_no_step_selected_stay_and_others_turn_with_a(unselected, tmp_path):
    """Three steps: rows selected in none of them are the checkpoint's; rows of B that are not selected are
    kept by "frozen" alone, but those selected before turn with A in both; moved_* are what the merged weights
    did. Differences of weights of 0.2 in fp32 have an error of 1e-8."""
    make_small().save_pretrained(tmp_path / "base")
    model = Qwen3.from_pretrained(tmp_path / "base", low_rank=lora.Settings(3, 6))
    start = make_small()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ever, projections = {}, [f"model.layers.{i}.self_attn.{which}_proj" for i in range(2) for which in "qk"]
    for step in range(3):
        optimizer.zero_grad()
        _, magnitudes = backward(model)
        masks = select_rows(magnitudes, 0.3, "random", torch.Generator().manual_seed(step))
        squares = mask_gradients(model, masks)
        before = {name: lora.merged(model, f"{name}.weight").double() for name in projections}
        factors = {name: model.get_submodule(name).lora_B.weight.clone() for name in projections}
        moved = masked_step(optimizer, model, masks, squares, unselected)
        changes = {True: [], False: []}
        for name in projections:
            mask, weight = masks[f"{name}.weight"], f"{name}.weight"
            change = lora.merged(model, weight).double() - before[name]
            for selected in (True, False):
                changes[selected].append(change[mask == selected].flatten())
            ever[name] = ever.get(name, torch.zeros_like(mask)) | mask
            assert torch.equal(
                lora.merged(model, weight)[~ever[name]], start.get_parameter(weight)[~ever[name]]
            )
            now = model.get_submodule(name).lora_B.weight
            if unselected == "frozen":
                assert torch.equal(now[~mask], factors[name][~mask])
            if step:  # A stands still in the first step, as B is 0
                assert change[ever[name] & ~mask].abs().min(1).values.max() > 0
        for value, selected in zip(moved[:2], (True, False), strict=True):
            exact = torch.cat(changes[selected]).square().mean().sqrt()
            assert value.item() == pytest.approx(exact.item(), rel=1e-3, abs=1e-8)
    for name, parameter in start.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_targets_without_values_train_in_two_stages(tmp_path):
    """The first layer's values come of frozen weights alone, and need no gradient."""
    model = trained(tmp_path, targets=["q_proj", "k_proj"])
    backward(model)
    gradients = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert len(gradients) == 2 * 2 * 2 and all("q_proj" in name or "k_proj" in name for name in gradients)


# ---------------------------------------------------------------------------------------------------- on disk


def test_transformers_peft_and_vllm_load_what_is_written(tmp_path):
    """Of the family that has biases and a head of its own."""
    model = trained(tmp_path, tied=False, **FAMILIES["qwen2"])
    model.save_pretrained(tmp_path / "out", companions_from=tmp_path / "base")
    ids = torch.arange(40)[None]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, logits := model(ids), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(Qwen3.from_pretrained(tmp_path / "out")(ids), logits, rtol=1e-4, atol=1e-4)
    factors = {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}
    save_file({"ids": ids, "logits": logits, **factors}, tmp_path / "out" / "expected.safetensors")
    printed = output_of(ROOT / "tests" / "adapters.py", tmp_path / "base", tmp_path / "out")
    assert printed == f"{2 * 7 * 2} factors, twice\n"


def test_a_checkpoint_has_what_trains_and_goes_on_to_the_bit(tmp_path):
    def step(model, optimizer):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()

    model = trained(tmp_path)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step(model, optimizer)
    resume.save(tmp_path / "steps", 1, model, optimizer, {"settings": {}, "random": None}, {}, 1)
    step(model, optimizer)
    other = Qwen3.from_pretrained(tmp_path / "base", low_rank=lora.Settings(3, 6))
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2)
    [path] = (tmp_path / "steps").glob("step-*")
    stored = {name for file in path.glob("*.safetensors") for name in load_file(file)}
    assert {name.split()[0] for name in stored} == {"weight", "exp_avg", "exp_avg_sq", "step"}
    assert all("lora_" in name for name in stored) and len(stored) == 4 * 2 * 7 * 2
    resume.load(path, other, optimizer)
    step(other, optimizer)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_there_is_never_a_second_model(tmp_path):
    """What sync gives vLLM is one merged weight at a time, and what is not updated is the model's own."""
    model, alive = trained(tmp_path), 0
    own = {parameter.data_ptr() for parameter in model.parameters()}
    for name, tensor in lora.all_merged(model):
        alive += tensor.data_ptr() not in own
        assert (tensor.data_ptr() in own) == (name.split(".")[-2] not in lora.TARGETS), name
    assert alive == 2 * 7 and len(dict(dense(model).named_parameters())) == len(list(lora.all_merged(model)))


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lora_alpha": 16}, "--lora-alpha and --lora-targets need --lora RANK"),
        ({"lora_targets": ["q_proj"]}, "--lora-alpha and --lora-targets need --lora RANK"),
        (
            {"lora": 4, "lora_targets": ["q_proj", "v_proj"]},
            "--lora-targets q_proj v_proj: add q_proj and k_proj",
        ),
    ],
)
def test_settings_that_do_nothing_are_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        config.check(config.Config(**settings), 1, False)


def test_a_step_of_another_base_is_not_exported(tmp_path):
    model = trained(tmp_path)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    made_with = config.Config(model=str(tmp_path / "base"), lora=3, lora_alpha=6)
    settings = resume.settings(made_with, config.MAY_CHANGE)
    state = {"settings": settings, "random": [resume.random_states()]}
    resume.save(tmp_path / "steps", 1, model, optimizer, state, {}, 1)
    make_small(seed=5).save_pretrained(tmp_path / "other", companions_from=TINY)
    how = tmp_path / "steps" / "step-000001", tmp_path / "out", "--model", tmp_path / "other"
    assert "contents of --model are not what the run began with" in refusal("run/export.py", *how)
