"""saliency.py against hand-written magnitudes, the dense layout, and what an optimizer step really does to rows."""

import pytest
import torch
from conftest import make_small
from hypothesis import given, settings
from hypothesis import strategies as st

from saliency import Tracker, mask_gradients, overlap, select_rows, selected_share


def magnitudes_by_hand(model, sequences, site):
    """The paper's M from hooks on the projections, one sequence at a time, in float64."""
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
            heads = out.reshape(len(sequence), -1, 16)  # (T, heads, D)
            totals[key] = totals.get(key, 0) + heads.square().sum(0).sqrt()
    for hook in hooks:
        hook.remove()
    return {key: total / len(sequences) for key, total in totals.items()}


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 20),
    st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=4), min_size=1, max_size=3),
    st.sampled_from(["proj", "norm"]),
    st.booleans(),
)
def test_shared_prefix_magnitudes_equal_one_row_per_completion(prompt_length, groups, site, checkpointing):
    model, sequences = make_small(), []
    model.checkpointing = checkpointing
    with Tracker(model, site) as tracker:
        for lengths in groups:
            prompt = torch.randint(0, 101, (prompt_length,))
            completions = [torch.randint(0, 101, (n,)) for n in lengths]
            sequences += [torch.cat((prompt, completion)) for completion in completions]
            sum(lp.sum() for lp in model.group_logprobs(prompt, completions)).backward()  # recomputes the blocks
    expected = magnitudes_by_hand(model, sequences, site)
    magnitudes = tracker.magnitudes()
    assert magnitudes.keys() == expected.keys()
    for name, magnitude in magnitudes.items():
        assert magnitude.dtype == torch.float32
        torch.testing.assert_close(magnitude.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_plain_forwards_count_each_row_once(small):
    ids = torch.randint(0, 101, (3, 12))
    with Tracker(small) as tracker:
        small(ids[:2])
        small(ids[2:])
    for name, expected in magnitudes_by_hand(small, list(ids), "proj").items():
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
    with pytest.raises(RuntimeError, match="no forward"):
        Tracker(small).magnitudes()
    with Tracker(small), pytest.raises(RuntimeError, match="another Tracker"), Tracker(small):
        pass


# --------------------------------------------------------------------------------------------------------- selection


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


# ----------------------------------------------------------------------------------------------------------- masking


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


def test_after_an_adamw_step_only_selected_rows_have_moved(small):
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2, weight_decay=0.0)
    masks = select_rows(backward(small), 0.3)
    old = {name: p.detach().clone() for name, p in small.named_parameters()}
    mask_gradients(small, masks)
    optimizer.step()
    for name, parameter in small.named_parameters():
        moved = (parameter != old[name]).flatten(1).any(1) if parameter.dim() > 1 else parameter != old[name]
        if name in masks:
            assert torch.equal(moved, masks[name]), name
        elif "embed" not in name:
            assert moved.any(), name


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
