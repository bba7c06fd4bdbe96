"""The CUDA branches without a card, on tensors that have a shape, a type and a device, but no values.

Meta tensors have autograd, and attention treats as a GPU's whatever is not a CPU's: a whole step goes back on
them. Fake tensors say that they are on `cuda` and do not mix with a CPU's, as on a card, but a CPU build of
PyTorch has no autograd for them; so their backward is called by hand.
"""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode

import dapo
import grpo
import saliency
from core import attention, optimizer
from core.attention import FLASH, FLASH_ON_CPU, GroupAttention, Layout, causal_attention
from core.parallel import Share
from model import Head, Qwen3, Qwen3Config, TokenLogprobs

FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CUDA, META = 1, 14  # of c10::DeviceType
# Qwen3-8B with two layers: every shape of the real one.
SHAPE = Qwen3Config(4096, 2, 32, 12288, False, 151936, 8, 128, 40960, rope_scaling=YARN)


class Called(TorchDispatchMode):
    """Counts the operators that reach a device: {overload: times}."""

    def __init__(self):
        super().__init__()
        self.times = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.times[function] = self.times.get(function, 0) + 1
        return function(*args, **(kwargs or {}))

    def attention(self):
        """Of attention only, by names: whatever computes a softmax, on any backend."""
        words = "attention", "softmax", "cudnn", "efficient"
        return {function: n for function, n in self.times.items() if any(w in str(function) for w in words)}


class Context(SimpleNamespace):
    """What autograd hands to a Function."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def set_materialize_grads(self, wanted):
        pass


@pytest.fixture
def cuda():
    """Inside it device="cuda" makes fake tensors. A CPU build of PyTorch fails where C++ asks for the current
    CUDA device, which it does not know; it is lent the answer of meta tensors, as FakeTensorMode does it in
    CUDA builds that find no card."""
    name = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry, by DeviceType
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 15).in_dll(library, name)
    before, guards[CUDA] = guards[CUDA], guards[CUDA] or guards[META]
    with FakeTensorMode(), torch.no_grad():
        yield
    guards[CUDA] = before


def layout_on_cuda(prompt_length, lengths, device, share):
    """A Layout that is built as ever, on the CPU: a fake mode cannot know how many indices there will be."""
    with unset_fake_temporarily():
        layout = Layout(prompt_length, lengths, "cpu", share)
    for name, index in vars(layout).items():
        if isinstance(index, torch.Tensor):
            setattr(layout, name, torch.empty(index.shape, dtype=index.dtype, device=device))
    return layout


def bf16(*shape, device="cuda"):
    return torch.empty(shape, dtype=torch.bfloat16, device=device)


def looks(tensors):
    return [(tuple(x.shape), x.dtype, x.device.type) for x in tensors]


# -------------------------------------------------------------------------------------------------- attention


def test_the_operators_take_and_return_what_attention_counts_on():
    """It calls them by position, and they are not PyTorch's public interface."""

    def names(function):
        return [argument.name for argument in function._schema.arguments if not argument.kwarg_only]

    start = ["query", "key", "value"]
    assert names(FLASH) == [*start, "dropout_p", "is_causal", "return_debug_mask"]
    assert len(FLASH._schema.returns) == 9
    lengths = ["cum_seq_q", "cum_seq_k", "max_q", "max_k"]
    returned = [value.name for value in FLASH._schema.returns]
    assert returned == ["output", "logsumexp", *lengths, "rng_state", "unused", "debug_attn_mask"]
    state = ["philox_seed", "philox_offset"]
    before = ["grad_out", *start, "out", "logsumexp"]
    assert names(FLASH_BACKWARD) == [*before, *lengths, "dropout_p", "is_causal", *state]


@pytest.mark.parametrize(
    "batch, tokens, keys, heads, key_heads, causal",
    [
        (1, 28672, 28672, 32, 8, True),  # a prompt of the recipes
        (1, 8192, 28672, 32, 8, False),  # a pass and its prompt
        (16, 4096, 4096, 32, 8, True),  # a pass and itself
        (1, 1, 1, 32, 8, True),
        (1, 131072, 131072, 4, 1, True),  # 128K, of which 8 ranks have a key head each
        (1, 65536, 126976, 4, 1, False),
        (2, 300, 300, 16, 16, True),  # without grouped queries
    ],
)
def test_flash_kernels_in_the_shapes_of_training(cuda, batch, tokens, keys, heads, key_heads, causal):
    q = bf16(batch, tokens, heads, 128)
    k, v = bf16(batch, keys, key_heads, 128), bf16(batch, keys, key_heads, 128)
    with Called() as called:
        out, lse, rest = attention.flash(q, k, v, causal)
        gradients = attention.flash_backward(torch.empty_like(out), q, k, v, out, lse, rest, causal)
    assert called.attention() == {FLASH: 1, FLASH_BACKWARD: 1}
    assert looks([out, lse]) == [*looks([q]), ((batch, tokens, heads), torch.float32, "cuda")]
    assert looks(gradients) == looks([q, k, v])


@pytest.mark.parametrize(
    "prompt, lengths, own", [(28672, [4096, 4096], 1), (126976, [4096, 17, 1, 3000], 8), (1, [1, 2], 1)]
)
def test_completions_and_their_prompt_on_cuda(cuda, prompt, lengths, own):
    """Forward and backward of a group: of equal lengths, and of others, whose padding is indexed."""
    N, heads, key_heads = sum(lengths), 32 // own, 8 // own
    layout = layout_on_cuda(prompt, lengths, "cuda", Share(N))
    tensors = [bf16(1, N, heads, 128), *(bf16(1, n, key_heads, 128) for n in (N, N, prompt, prompt))]
    context = Context()
    with Called() as called:
        out = GroupAttention.forward(context, *tensors, layout)
        *gradients, none = GroupAttention.backward(context, torch.empty_like(out))
    assert called.attention() == {FLASH: 2, FLASH_BACKWARD: 2}
    assert looks([out, *gradients]) == looks([tensors[0], *tensors]) and none is None


def test_a_prompt_and_documents_train_by_flash_kernels_alone():
    """What PyTorch's own choice would depend on: the card, the release, what else was imported."""
    for device, forward in (("meta", FLASH), ("cpu", FLASH_ON_CPU)):
        q, k = (bf16(1, 90, heads, 16, device=device).requires_grad_() for heads in (4, 2))
        with Called() as called:
            causal_attention(q, k, k).sum().backward()
            causal_attention(q, k, k, [40, 1, 49]).sum().backward()
        assert called.times[forward] == 4 and len(called.attention()) == 2
        assert q.grad.shape == q.shape


# ------------------------------------------------------------------------------------------------- the head


def test_the_head_in_chunks_on_cuda(cuda):
    hidden, weight, targets = (
        bf16(8192, 4096),
        bf16(151936, 4096),
        torch.zeros(8192, dtype=int, device="cuda"),
    )
    context, chunk = Context(needs_input_grad=(True, True)), Head(SHAPE).chunk
    logprobs, entropies = TokenLogprobs.forward(context, hidden, weight, targets, 1.0, chunk)
    assert looks([logprobs, entropies]) == [((8192,), torch.float32, "cuda")] * 2
    for grad_entropies in (None, entropies):
        context.last = None
        gradients = TokenLogprobs.backward(context, logprobs, grad_entropies)
        assert looks(gradients[:2]) == looks([hidden, weight])


# ---------------------------------------------------------------------------------------------------- a step


def test_a_forward_mixes_no_devices(cuda, monkeypatch):
    """From prompts of 128K tokens to log-probabilities and masks; documents of SFT."""
    monkeypatch.setattr("model.Layout", layout_on_cuda)
    with unset_fake_temporarily():
        model = Qwen3.empty(SHAPE, torch.bfloat16, "meta")
    for module in model.modules():
        module._parameters |= {
            name: bf16(*p.shape) for name, p in module._parameters.items() if p is not None
        }
    lengths = [4096, 100, 1]
    with saliency.Tracker(model) as tracker:
        prompt = model.read(torch.zeros(126976, dtype=int, device="cuda"))
        completions = [torch.zeros(length, dtype=int, device="cuda") for length in lengths]
        results = [*model.completion_logprobs(prompt, completions)]
    assert looks(results) == [((sum(lengths),), torch.float32, "cuda")] * 2
    masks = saliency.select_rows(tracker.magnitudes())
    assert {mask.device.type for mask in masks.values()} == {"cuda"}


@pytest.mark.parametrize("checkpointing, again", [(False, True), (True, True), (True, False)])
def test_a_whole_step_goes_back_through_flash_kernels(checkpointing, again):
    """Reading, two passes, loss, backward, mask, norm and clipping, in bf16 at the size of the recipes.
    again: whether attention is computed once more in backward."""
    model, layers = Qwen3.empty(SHAPE, torch.bfloat16, "meta"), SHAPE.num_hidden_layers
    model.checkpointing, model.attention_recompute = checkpointing, again
    parts = [[4096, 4096], [4096, 3000, 1]]
    with Called() as called, saliency.Tracker(model) as tracker:
        prompt = model.read(torch.zeros(28672, dtype=int, device="meta"))
        leaves = prompt.detach()
        for lengths in parts:
            completions = [torch.zeros(length, dtype=int, device="meta") for length in lengths]
            logprobs, _ = model.completion_logprobs(leaves, completions)
            totals = grpo.Totals(5, 15289, 4096)
            advantages = torch.ones_like(logprobs)
            loss, _ = dapo.loss(logprobs, logprobs.detach(), advantages, lengths, totals)
            loss.backward()
        prompt.backward(leaves)
    calls = (1 + 2 * len(parts)) * layers  # the prompt's own; a pass's to the prompt and to itself
    times = 2 if checkpointing and again else 1
    assert called.attention() == {FLASH: times * calls, FLASH_BACKWARD: calls}
    parameters = list(model.parameters())
    assert looks(p.grad for p in parameters) == looks(parameters)
    saliency.mask_gradients(model, saliency.select_rows(tracker.magnitudes()))
    assert get_total_norm([p.grad for p in parameters]).dtype == torch.bfloat16
    clip_grad_norm_(parameters, 1.0)


@pytest.mark.parametrize("masters", list(optimizer.MASTERS))
@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_every_optimizer_steps_by_the_fused_kernel_with_its_moments_where_they_belong(
    cuda, monkeypatch, name, masters
):
    """Nothing of a CPU's mixes with the card's, but the moments of adamw-offload, which come and go."""
    monkeypatch.setattr(optimizer, "levels", lambda signed: torch.empty(256))
    shapes, dtype = ((8, 600), (600,)), optimizer.MASTERS[masters]
    parameters = [torch.nn.Parameter(torch.empty(n, dtype=dtype, device="cuda")) for n in shapes]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    how = {"optimizer": name, "masters": masters, "learning_rate": 1e-6, "weight_decay": 0.1}
    stepping = optimizer.make_optimizer(SimpleNamespace(**how, adam_beta2=0.999), parameters)
    with Called() as called:
        stepping.step()
    assert called.times[torch.ops.aten._fused_adamw_.default] >= 1
    for parameter in parameters:
        for key, kept in stepping.state[parameter].items():
            if kept.dim():
                on_cpu = name == "adamw-offload"
                assert kept.device.type == ("cpu" if on_cpu else "cuda"), key
        assert parameter.dtype == dtype and parameter.is_cuda
