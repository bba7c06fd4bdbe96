"""saliency.py against hand-written magnitudes, the dense layout, and what an optimizer step really does to
rows."""

import pytest
import torch
from conftest import FAMILIES, make_small
from hypothesis import given, settings
from hypothesis import strategies as st

from saliency import Tracker, mask_gradients, masked_step, overlap, select_rows, selected_share


def magnitudes_by_hand(model, sequences, site, counted=slice(None)):
    """The paper's M from hooks on the projections, one sequence at a time, in float64; `counted`: of these
    tokens."""
    totals, captured = {}, {}
    modules = {"proj": ("q_proj", "k_proj"), "norm": ("q_norm", "k_norm")}[site]
    hooks = []
    for i, block in enumerate(model.model.layers):
        for which, module in zip("qk", modules, strict=True):
            key = f"model.layers.{i}.self_attn.{which}_proj"
            hook = lambda m, args, out, key=key: captured.update({key: out.detach().double()})  # noqa: E731
            hooks.append(getattr(block.self_attn, module).register_forward_hook(hook))
    for sequence in sequences:
        model(sequence[None])
        for key, out in captured.items():
            heads = out.reshape(len(sequence), -1, 16)[counted]  # (T, heads, D)
            totals[key] = totals.get(key, 0) + heads.square().sum(0).sqrt()
    for hook in hooks:
        hook.remove()
    return {key: total / len(sequences) for key, total in totals.items()}


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 20),
    st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from(["proj", "norm"]),
    st.sampled_from(["all", "prompt", "not-first"]),
    st.booleans(),
)
def test_shared_prefix_magnitudes_equal_one_row_per_completion(
    prompt_length, groups, site, tokens, checkpointing
):
    model, sequences = make_small(), []
    model.checkpointing = checkpointing
    with Tracker(model, site, tokens) as tracker:
        for lengths in groups:
            prompt = torch.randint(0, 101, (prompt_length,))
            completions = [torch.randint(0, 101, (n,)) for n in lengths]
            sequences += [torch.cat((prompt, completion)) for completion in completions]
            sum(
                lp.sum() for lp in model.group_logprobs(prompt, completions)
            ).backward()  # recomputes the blocks
    counted = {"all": slice(None), "prompt": slice(prompt_length), "not-first": slice(1, None)}[tokens]
    expected = magnitudes_by_hand(model, sequences, site, counted)
    magnitudes = tracker.magnitudes()
    assert magnitudes.keys() == expected.keys()
    for name, magnitude in magnitudes.items():
        assert magnitude.dtype == torch.float32
        torch.testing.assert_close(magnitude.double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", ["all", "prompt", "not-first"])
def test_plain_forwards_count_each_row_once(small, tokens):
    ids = torch.randint(0, 101, (3, 12))
    with Tracker(small, "proj", tokens) as tracker:
        small(ids[:2])
        small(ids[2:])
    counted = slice(1 if tokens == "not-first" else 0, None)
    for name, expected in magnitudes_by_hand(small, list(ids), "proj", counted).items():
        torch.testing.assert_close(tracker.magnitudes()[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_tracker_counts_only_what_is_inside_it(small):
    ids = torch.randint(0, 101, (1, 12))
    with Tracker(small) as tracker:
        small(ids)
    before = tracker.magnitudes()
    small(ids * 0)
    for name, magnitude in tracker.magnitudes().items():
        assert torch.equal(magnitude, before[name])


def test_tracker_misuse_is_refused(small):
    with pytest.raises(ValueError, match="site"):
        Tracker(small, "rope")
    with pytest.raises(ValueError, match="tokens"):
        Tracker(small, tokens="some")
    with pytest.raises(RuntimeError, match="no forward"):
        Tracker(small).magnitudes()
    with Tracker(small), pytest.raises(RuntimeError, match="another Tracker"), Tracker(small):
        pass
    with pytest.raises(ValueError, match="'norm' needs a model with q_norm"):
        Tracker(make_small(**FAMILIES["llama"]), "norm")


# -------------------------------------------------------------------------------------------------- selection


MAGNITUDE = {"q": torch.tensor([[5.0, 1, 4, 2, 3, 0, 0, 0, 0, 9], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0]])}


def chosen(rule, fraction, **kwargs):
    mask = select_rows(MAGNITUDE, fraction, rule, **kwargs)["q.weight"].view(2, 10)
    return [row.nonzero().flatten().tolist() for row in mask]


def test_rows_are_chosen_per_head_with_ties_to_the_lower_dimension():
    assert chosen("top", 0.3) == [[0, 2, 9], [0, 1, 2]]
    assert chosen("bottom", 0.3) == [[5, 6, 7], [0, 1, 2]]
    assert chosen("all", 0.3) == [list(range(10))] * 2


@pytest.mark.parametrize("fraction, kept", [(0.3, 38), (1.0, 128), (0.001, 1), (0.29, 37), (0.5, 64)])
def test_a_head_keeps_the_floor_of_fraction_times_its_size(fraction, kept):
    mask = select_rows({"q": torch.rand(3, 128)}, fraction)["q.weight"]
    assert mask.view(3, 128).sum(1).tolist() == [kept] * 3


def test_floor_is_not_fooled_by_rounding():
    assert select_rows({"q": torch.rand(1, 100)}, 0.29)["q.weight"].sum() == 29  # 0.29 * 100 < 29 in floats


def test_random_rows_are_fresh_each_draw_and_equal_for_equal_generators():
    one, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    first = chosen("random", 0.3, generator=one)
    assert [len(rows) for rows in first] == [3, 3]
    assert first == chosen("random", 0.3, generator=other)
    assert first != chosen("random", 0.3, generator=one)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1])
def test_bad_fractions_and_rules_are_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        select_rows(MAGNITUDE, fraction)
    with pytest.raises(ValueError, match="rule"):
        select_rows(MAGNITUDE, 0.3, "most")


def test_share_and_overlap_of_known_masks():
    magnitudes = {"a": torch.tensor([[3.0, 4.0]])}
    left, right = {"a.weight": torch.tensor([True, False])}, {"a.weight": torch.tensor([True, True])}
    assert selected_share(magnitudes, left).item() == pytest.approx(9 / 25)
    assert overlap(left, right).item() == 1.0
    assert overlap(right, left).item() == 0.5


# ---------------------------------------------------------------------------------------------------- masking


def backward(model):
    model.zero_grad()
    with Tracker(model) as tracker:
        completions = [torch.arange(4), torch.arange(3)]
        sum(lp.sum() for lp in model.group_logprobs(torch.arange(20), completions)).backward()
    return tracker.magnitudes()


def test_gradients_are_zero_outside_the_rows_and_untouched_elsewhere(small):
    masks = select_rows(backward(small), 0.3)
    assert len(masks) == 2 * 2
    before = {name: p.grad.clone() for name, p in small.named_parameters()}
    mask_gradients(small, masks)
    for name, parameter in small.named_parameters():
        if name not in masks:
            assert torch.equal(parameter.grad, before[name]), name
            continue
        mask = masks[name]
        assert torch.equal(parameter.grad[mask], before[name][mask])
        assert parameter.grad[~mask].abs().max() == 0
        assert parameter.grad[mask].abs().min(1).values.max() > 0
        heads = mask.view(-1, 16).sum(1)
        assert (heads == 4).all()  # floor(0.3 * 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_after_an_adamw_step_only_selected_rows_have_moved(family):
    """A bias of Qwen2's q_proj and k_proj with the rows of its weight; v_proj's as a whole."""
    small = make_small(**FAMILIES[family])
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2, weight_decay=0.0)
    masks = select_rows(backward(small), 0.3)
    old = {name: p.detach().clone() for name, p in small.named_parameters()}
    mask_gradients(small, masks)
    optimizer.step()
    for name, parameter in small.named_parameters():
        moved = (parameter != old[name]).flatten(1).any(1) if parameter.dim() > 1 else parameter != old[name]
        if (weight := name.replace("bias", "weight")) in masks:
            assert torch.equal(moved, masks[weight]), name
        elif "embed" not in name:
            assert moved.any(), name


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("unselected", ["grad", "frozen"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_unselected_rows_after_several_steps_are_what_is_promised(family, unselected, decay):
    """Against AdamW written out by hand in float64, row by row: under "grad" a row selected before goes on
    moving, under "frozen" neither it nor its moments change, weight decay included. Biases, too."""
    small = make_small(**FAMILIES[family])
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2, weight_decay=decay)
    parameters = dict(small.named_parameters())
    generator = torch.Generator().manual_seed(3)
    magnitudes = backward(small)
    names = [
        name.replace("weight", kind)
        for name in select_rows(magnitudes, 0.3)
        for kind in ("weight", *(["bias"] if small.config.qkv_bias else []))
    ]
    weights = {name: parameters[name].detach().double() for name in names}
    first, second = ({name: torch.zeros_like(weights[name]) for name in names} for _ in range(2))
    for t in range(1, 6):
        masks = select_rows(backward(small), 0.3, "random", generator)  # a fresh draw each step
        raw = {name: parameters[name].grad.double().square() for name in names}
        squares = mask_gradients(small, masks)
        masks |= {name: masks[name.replace("bias", "weight")] for name in names}
        gradients = {name: parameters[name].grad.double() for name in names}
        assert not any(gradients[name][~masks[name]].any() for name in names)
        before = {name: parameters[name].detach().clone() for name in names}
        chosen = {name: mask for name, mask in masks.items() if name.endswith("weight")}
        *moved, share = masked_step(optimizer, small, chosen, squares, unselected)
        for name in names:
            m, v = (
                0.9 * first[name] + 0.1 * gradients[name],
                0.999 * second[name] + 0.001 * gradients[name] ** 2,
            )
            new = weights[name] * (1 - 1e-2 * decay) - 1e-2 * (m / (1 - 0.9**t)) / (
                (v / (1 - 0.999**t)).sqrt() + 1e-8
            )
            rows = masks[name] if unselected == "frozen" else torch.tensor(True)
            rows = rows[:, None] if unselected == "frozen" and weights[name].dim() == 2 else rows
            weights[name] = torch.where(rows, new, weights[name])
            first[name], second[name] = torch.where(rows, m, first[name]), torch.where(rows, v, second[name])
            state = optimizer.state[parameters[name]]
            torch.testing.assert_close(parameters[name].double(), weights[name], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(state["exp_avg"].double(), first[name], rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(state["exp_avg_sq"].double(), second[name], rtol=1e-4, atol=1e-9)
            if unselected == "frozen":
                assert torch.equal(parameters[name][~masks[name]], before[name][~masks[name]])
        change = {name: (parameters[name].detach() - before[name]).square() for name in names}
        for value, wanted in zip(moved, (True, False), strict=True):
            rows = torch.cat([change[name][masks[name] == wanted].flatten() for name in names])
            assert value.item() == pytest.approx(rows.double().mean().sqrt().item(), rel=1e-5)
        selected = sum(raw[name][masks[name]].sum() for name in names)
        assert share.item() == pytest.approx((selected / sum(x.sum() for x in raw.values())).item(), rel=1e-6)
    if unselected == "grad":
        assert moved[0] > moved[1] > 0
    else:
        assert moved[0] > 0 == moved[1]


def test_with_all_rows_selected_no_other_row_has_moved(small):
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    masks = select_rows(backward(small), 0.3, "all")
    squares = mask_gradients(small, masks)
    selected, others, share = masked_step(optimizer, small, masks, squares, "frozen")
    assert selected > 0 and others.isnan() and share == 1


def test_momentum_still_moves_a_row_that_was_selected_before(small):
    """What the paper's gradient mask does under AdamW, and why train.py's docstring says so."""
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2, weight_decay=0.0)
    magnitudes = backward(small)
    first, second = select_rows(magnitudes, 0.3), select_rows(magnitudes, 0.3, "bottom")
    mask_gradients(small, first)
    optimizer.step()
    old = {name: small.get_parameter(name).detach().clone() for name in first}
    backward(small)
    mask_gradients(small, second)
    optimizer.step()
    for name in first:
        moved = (small.get_parameter(name) != old[name]).any(1)
        assert torch.equal(moved, first[name] | second[name])
