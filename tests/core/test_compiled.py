"""--compile: norms, rotation and SwiGLU by torch.compile against the plain ones, beside vLLM, which patches
the compiler of its process. On a CPU it needs a C++ compiler and minutes: COMPILE_TESTS=1, or GPU_TESTS=1
where there is a GPU; skipped everywhere else."""

import os

import pytest
import torch
from conftest import make_small

import model as components
from core.attention import rope_tables

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
wanted = CUDA or "COMPILE_TESTS" in os.environ
pytestmark = pytest.mark.skipif(not wanted, reason="needs COMPILE_TESTS=1 and minutes, or a GPU")


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if not CUDA:
        import rollout  # noqa: F401 - vLLM's patches
    owners = components.RMSNorm, components.Attention, components.MLP
    plain = {(owner, name): owner.__dict__[name] for owner, name in zip(owners, ("norm", "rotate", "gate"))}
    components.compile_elementwise()
    yield
    for (owner, name), function in plain.items():
        setattr(owner, name, function)


def cases(dtype):
    """(compiled, plain, tensors that gradients go to, other arguments)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    tables = rope_tables(make_small().config, torch.arange(333, device=DEVICE), dtype)
    C = components
    yield C.RMSNorm.norm, C.rms_norm, [draw(1, 333, 256), draw(256)], [1e-6]
    yield C.RMSNorm.norm, C.rms_norm, [draw(1, 333, 4, 16), draw(16)], [1e-6]
    yield C.Attention.rotate, C.rotate, [draw(1, 333, 4, 16)], tables
    yield C.MLP.gate, C.swiglu, [draw(1, 333, 768), draw(1, 333, 768)], []


def results(function, tensors, others, dtype):
    """-> what it returns and the gradients of its sum of squares, as fp64."""
    tensors = [x.detach().to(dtype).requires_grad_() for x in tensors]
    others = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in others]
    out = function(*tensors, *others)
    out.square().sum().backward()
    return [x.double() for x in (out, *(x.grad for x in tensors))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if CUDA else [torch.float32])
def test_compiled_parts_round_no_worse_than_plain_ones(dtype):
    """Values and gradients, each as far from fp64 as a multiple of the dtype's rounding."""
    for fast, plain, tensors, others in cases(dtype):
        exact = results(plain, tensors, others, torch.float64)
        bound = 8 * torch.finfo(dtype).eps
        for ours, theirs, right in zip(
            results(fast, tensors, others, dtype), results(plain, tensors, others, dtype), exact
        ):
            far = [((x - right).norm() / right.norm()).item() for x in (ours, theirs)]
            assert far[0] < max(bound, 2 * far[1]), plain.__name__


@pytest.mark.parametrize("again", [True, False])
def test_a_step_with_compiled_parts_equals_a_plain_one(again):
    """With recomputed blocks, attention's results recomputed or kept."""
    outcomes = []
    for owner_functions in ("plain", "compiled"):
        model = make_small()
        if owner_functions == "plain":
            for module in model.modules():
                if isinstance(module, components.RMSNorm):
                    module.norm = components.rms_norm
                elif isinstance(module, components.Attention):
                    module.rotate = components.rotate
                elif isinstance(module, components.MLP):
                    module.gate = components.swiglu
        model.checkpointing, model.attention_recompute = True, again
        completions = [torch.arange(n) + 3 for n in (7, 1, 12)]
        logprobs = torch.cat(model.group_logprobs(torch.arange(60), completions))
        logprobs.sum().backward()
        outcomes.append([logprobs.detach(), *(p.grad for p in model.parameters())])
    for plain, fast in zip(*outcomes):
        torch.testing.assert_close(fast, plain, atol=1e-5 * plain.abs().max().item(), rtol=1e-4)
