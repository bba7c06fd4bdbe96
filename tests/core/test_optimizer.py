"""core/optimizer.py against torch.optim.AdamW, the definition of the 8-bit levels, and the arithmetic of
rounding. tests/ranks.py has the part with several ranks."""

import math
from functools import cache
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import make_small

from core import optimizer as optimizers
from core.optimizer import MASTERS, OPTIMIZERS, levels, make_optimizer, pack, unpack
from run import resume
from saliency import mask_gradients, masked_step

KINDS = [(name, masters) for name in OPTIMIZERS for masters in MASTERS]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(*shape, seed=0, dtype=torch.float32):
    return torch.nn.Parameter((0.1 * normal(*shape, seed=seed)).to(dtype))


def made(parameters, name="adamw", masters="fp32", rate=1e-3, decay=0.0, beta2=0.999):
    how = {"learning_rate": rate, "weight_decay": decay, "adam_beta2": beta2}
    return make_optimizer(SimpleNamespace(optimizer=name, masters=masters, **how), parameters)


def model_and_optimizer(name, masters, seed=0):
    """The rows of `small` have 48 and 80 elements: less than a block."""
    model = make_small(seed=seed).to(MASTERS[masters])
    return model, made(model.parameters(), name, masters)


def give_gradients(parameters, step):
    for number, parameter in enumerate(parameters):
        parameter.grad = normal(*parameter.shape, seed=1000 * step + number).to(parameter.dtype)


def train(model, optimizer, steps):
    for step in steps:
        give_gradients(model.parameters(), step)
        optimizer.step()


# ---------------------------------------------------------------------------------------------- the levels


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_dynamic_tree_quantization(signed):
    """By its bits: some zeros, a one, and the rest counts evenly through [0.1, 1) of the decade that the
    zeros say (arXiv 1511.04561, section 2.2.4); each value is the middle of its part."""
    bits = 7 if signed else 8
    expected = {0.0, 1.0}
    for zeros in range(7):
        left = bits - zeros - 1
        for n in range(2**left):
            value = 10.0**-zeros * (0.1 + 0.9 * (n + 0.5) / 2**left)
            expected |= {value, -value} if signed else {value}
    torch.testing.assert_close(levels(signed), torch.tensor(sorted(expected)), rtol=1e-6, atol=0)
    # As torchao 0.18.0 and bitsandbytes 0.50.2 have them.
    some = {
        True: (-0.992968738079071, -5.5e-07, 0.992968738079071),
        False: (0.0, 3.25e-07, 0.9964843988418579),
    }
    found = levels(signed)[[0, 126 if signed else 1, 254]]
    torch.testing.assert_close(found, torch.tensor(some[signed]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_packed_values_are_the_nearest_levels_of_their_block(signed):
    values = normal(5, 600) ** 5  # over many decades
    values = values if signed else values.abs()
    values[1], values[2, :256] = 0, 0
    codes, scales = torch.empty(5, 600, dtype=torch.uint8), torch.empty(5, 3)
    pack(values, codes, scales, signed)
    for row in range(5):
        for block, start in enumerate((0, 256, 512)):
            part, scale = values[row, start : start + 256], scales[row, block]
            assert scale == part.abs().max()
            distance = (part[:, None] / scale.clamp(min=1e-30) - levels(signed)).abs()
            allowed = distance if signed else distance[:, 1:]  # a root is never 0
            found = distance.gather(1, codes[row, start : start + 256].long()[:, None])[:, 0]
            assert (found <= allowed.min(1).values + 1e-7).all()
    back = unpack(codes, scales, signed)
    assert (back[1] == 0).all() and (back[2, :256] == 0).all()
    assert signed or (back[values > 0] > 0).all()


# -------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_vectors_and_a_first_step_are_those_of_adamw(name):
    """A first step has no moments to round; a vector's are never packed."""
    ours, theirs = (torch.nn.ParameterList([matrix(7, 300), matrix(300, seed=1)]) for _ in range(2))
    packed, plain = made(ours, name, decay=0.1), torch.optim.AdamW(theirs, 1e-3, weight_decay=0.1)
    with mock.patch.object(optimizers, "SLICE", 600):  # two rows at a time
        for step in range(3):
            for parameters in (ours, theirs):
                give_gradients(parameters, step)
            packed.step(), plain.step()
            for a, b in zip(ours, theirs, strict=True):
                if step == 0 or a.dim() == 1 or name != "adamw8bit":
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_an_8_bit_step_is_adamws_with_unpacked_moments():
    parameter, decay, rate = matrix(4, 300), 0.1, 1e-3
    optimizer = made([parameter], "adamw8bit", decay=decay, beta2=0.99)
    first = second = torch.zeros(4, 300, dtype=torch.float64)
    for step in range(1, 6):
        weight = parameter.detach().double()
        give_gradients([parameter], step)
        gradient = parameter.grad.double()
        gradient[1] = parameter.grad[1] = 0  # as of a masked row
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient.square()
        update = (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
        torch.testing.assert_close(
            parameter.double(), weight * (1 - rate * decay) - rate * update, rtol=1e-5, atol=1e-7
        )
        state = optimizer.state[parameter]
        kept = unpack(state["first"], state["first_scale"], True).double()
        root = unpack(state["second"], state["second_scale"], False).double()
        for packed, exact in ((kept, first), (root, second.sqrt())):
            # Half the distance of levels: 0.45 / 64 of a block's largest in the uppermost of seven decades.
            assert (packed - exact).abs().max() <= 1.01 * 0.45 / 64 * exact.abs().max()
        first, second = kept, root.square()


def test_small_gradients_beside_large_ones_do_not_divide_by_nearly_nothing():
    """Second moments over seven decades: quantised themselves, and not their roots, the small ones would
    become 0, and the step 1 / eps times the first moment. An Adam step is at most
    (1 - beta1) / sqrt(1 - beta2) times the rate, with the rounding of a level (0.45 / 1, in the last
    decade)."""
    parameter = matrix(2, 256)
    optimizer = made([parameter], "adamw8bit")
    scales = 10.0 ** -(torch.arange(256) % 7)
    for step in range(20):
        before = parameter.detach().clone()
        parameter.grad = normal(2, 256, seed=step) * scales
        if step % 2:
            parameter.grad[1] = 0
        optimizer.step()
        assert (parameter - before).abs().max() <= 1e-3 * 2 * 0.1 / math.sqrt(0.001)


@pytest.mark.parametrize("name, masters", KINDS)
def test_what_is_kept_is_what_the_table_says(name, masters):
    parameter = matrix(8, 512, dtype=MASTERS[masters])
    optimizer = made([parameter], name, masters)
    give_gradients([parameter], 0)
    optimizer.step()
    kept = sum(x.nbytes for x in optimizer.state[parameter].values() if x.dim()) / parameter.numel()
    table = optimizers.bytes_per_parameter(name, masters)
    assert kept == table.moments + table.host
    assert parameter.element_size() == table.weight and parameter.grad.element_size() == table.gradient


def test_frozen_parameters_have_no_state():
    parameters = [matrix(2, 3), matrix(2, 3).requires_grad_(False)]
    for name in OPTIMIZERS:
        assert made(parameters, name).param_groups[0]["params"] == parameters[:1]


# ----------------------------------------------------------------------------------- masked rows, resuming


@pytest.mark.parametrize("name, masters", KINDS)
@pytest.mark.parametrize("unselected", ["grad", "frozen"])
def test_rows_that_are_not_selected_keep_what_was_there_or_move_by_momentum(name, masters, unselected):
    model, optimizer = model_and_optimizer(name, masters)
    other, alone = model_and_optimizer(name, masters)
    for step in range(3):
        for each in (model, other):
            give_gradients(each.parameters(), step)
        if step < 2:
            optimizer.step(), alone.step()
    names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "qk"]
    masks = {name: torch.arange(len(model.get_parameter(name))) % 3 == 0 for name in names}
    before = {}
    for name in names:
        parameter = model.get_parameter(name)
        state = {key: x.clone() for key, x in optimizer.state[parameter].items() if x.dim()}
        before[name] = {"weight": parameter.detach().clone(), **state}
    masked_step(optimizer, model, masks, mask_gradients(model, masks), unselected)
    mask_gradients(other, masks)
    alone.step()
    for name, mask in masks.items():
        parameter, expected = model.get_parameter(name), other.get_parameter(name)
        now = {"weight": parameter.detach(), **optimizer.state[parameter]}
        stepped = {"weight": expected.detach(), **alone.state[expected]}
        for key, old in before[name].items():
            assert torch.equal(now[key][mask], stepped[key][mask]), key
            kept = stepped[key] if unselected == "grad" else old
            assert torch.equal(now[key][~mask], kept[~mask]), key
        assert not torch.equal(stepped["weight"][~mask], before[name]["weight"][~mask])


@pytest.mark.parametrize("name, masters", KINDS)
def test_a_run_goes_on_to_the_bit(name, masters, tmp_path):
    model, optimizer = model_and_optimizer(name, masters)
    train(model, optimizer, range(2))
    resume.save(tmp_path, 2, model, optimizer, {"settings": {}, "random": {}}, {}, 1)
    other, again = model_and_optimizer(name, masters, seed=1)
    resume.load(tmp_path / "step-000002", other, again)
    for each in ((model, optimizer), (other, again)):
        train(*each, range(2, 4))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a].keys() == again.state[b].keys()
        for key, value in optimizer.state[a].items():
            assert value.dtype == again.state[b][key].dtype and torch.equal(value, again.state[b][key]), key


# ------------------------------------------------------------------------------------ stochastic rounding


def test_rounding_is_to_a_neighbour_and_exact_on_average():
    """Over all values of the 16 bits the average is the value itself: every term of the sum is exact."""
    values = torch.cat([normal(20), torch.tensor([0.0, 1.0, -1.5, 1 + 2**-23, 2 - 2**-23, 1e-30, -3e38])])
    bits = torch.arange(2**16, dtype=torch.int32)
    for value in values:
        rounded = optimizers.round_at_random(value.expand(2**16).contiguous(), bits)
        assert rounded.double().mean() == value.double()
        assert len(rounded.unique()) == (1 if value == value.bfloat16() else 2)


def test_bits_are_uniform_and_other_ones_in_each_step_and_parameter():
    """2^18 draws each; 5 standard deviations of a bit's frequency, and of a correlation."""
    places, n = torch.arange(2**18), 2**18
    drawn = [
        optimizers.random_16_bits(places, step, number) for step, number in ((0, 1), (1, 1), (0, 2), (5, 9))
    ]
    centred = []
    for bits in drawn:
        assert bits.min() >= 0 and bits.max() < 2**16
        for bit in range(16):
            assert abs((bits >> bit & 1).double().mean() - 0.5) < 5 * 0.5 / n**0.5
        centred.append((bits.double() - bits.double().mean()) / bits.double().std())
    pairs = [(a, b) for i, a in enumerate(centred) for b in centred[:i]]
    for a, b in [*pairs, (centred[0][1:], centred[0][:-1]), (centred[0][128:], centred[0][:-128])]:
        assert abs((a * b).mean()) < 5 / n**0.5


def test_at_a_rate_of_1e6_bf16_masters_move_as_they_should_only_with_stochastic_rounding():
    """A constant gradient moves every weight by the rate at each step, whatever its size. To the nearest of
    bf16, none moves: half a step of it is 3e-5 or more here. At random, a weight w moves by a whole
    step s with probability rate / s; the variance of that is below rate * s, and s at most w / 128."""
    rate, steps, n = 1e-6, 50, 128 * 512
    start = (0.01 + 0.03 * torch.rand(128, 512, generator=torch.Generator().manual_seed(0))).bfloat16()
    nearest, ours = (torch.nn.Parameter(start.clone()) for _ in range(2))
    plain = torch.optim.AdamW([nearest], rate, weight_decay=0.0)
    optimizer = made([ours], "adamw", "bf16", rate=rate)
    for _ in range(steps):
        nearest.grad = ours.grad = torch.ones_like(start)
        plain.step(), optimizer.step()
    assert torch.equal(nearest, start)
    moved = (start.double() - ours.detach().double()).mean().item()
    assert abs(moved - steps * rate) < 5 * (steps * rate * 0.04 / 128 / n) ** 0.5
    assert moved > 0


# ------------------------------------------------------------------------------------------------ it learns


@cache
def error_left(seed, name, masters):
    """Of a linear map learned from noisy samples in 120 steps; two times of three a row's gradient is masked,
    as LongAct masks."""
    target = normal(16, 64, seed=seed)
    parameter = torch.nn.Parameter(torch.zeros(16, 64, dtype=MASTERS[masters]))
    optimizer = made([parameter], name, masters)
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 120)
        inputs = normal(64, 32, seed=1000 * seed + step)
        noise = normal(16, 32, seed=10**6 + 1000 * seed + step)
        rows = torch.rand(16, 1, generator=torch.Generator().manual_seed(1000 * seed + step)) < 1 / 3
        wrong = (parameter.detach().float() - target) @ inputs + noise
        parameter.grad = (rows * (wrong @ inputs.T) / 32).to(parameter.dtype)
        optimizer.step()
    return (parameter.detach().float() - target).square().mean().item()


@pytest.mark.parametrize("name, masters", [("adamw8bit", "fp32"), ("adamw8bit", "bf16")])
def test_it_reaches_what_fp32_reaches_within_its_noise(name, masters):
    """On average over 6 seeds within one standard deviation of a seed; it starts from an error of 1."""
    usual = torch.tensor([error_left(seed, "adamw", "fp32") for seed in range(6)])
    reached = torch.tensor([error_left(seed, name, masters) for seed in range(6)])
    assert usual.max() < 0.2
    assert abs(reached.mean() - usual.mean()) < usual.std(), (reached, usual)
