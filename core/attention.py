"""Where tokens meet: rotary positions, causal attention, and a group's attention to the prompt it shares.

The keys and values of a prompt exist once. A completion's queries attend to the prompt's keys and, causally,
to their own completion's: two attention calls whose results are merged by their log-sum-exp. Nothing is
repeated for each completion, and nothing is computed only to be masked.

Shapes: B sequences, T tokens, H query heads, Hk key/value heads, D head size, P prompt tokens, G completions
of R_i tokens, N = sum(R_i), R = max(R_i). Tokens come before heads: (B, T, H, D).
"""

import math

import torch
import torch.nn.functional as F
from torch.nn.attention import activate_flash_attention_impl

from base.cli import BadInput

FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
FLASH_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

# ------------------------------------------------------------------------------------------- rotary positions


def rope_frequencies(config):
    """Qwen3Config -> inverse frequencies (D/2,) fp32 on the CPU, and the factor on cos and sin, 1.0 without
    YaRN. Types of RoPE: default (arXiv 2104.09864), linear (2306.15595), llama3 (2407.21783), yarn
    (2309.00071, sections 3.2 and 3.4)."""
    dim, base, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    wavelengths = base ** (torch.arange(0, dim, 2, device="cpu").float() / dim)  # over 2 pi, in tokens
    if scaling is None:
        return 1.0 / wavelengths, 1.0
    if scaling["rope_type"] == "linear":
        return 1.0 / wavelengths / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return llama3_frequencies(1.0 / wavelengths, scaling), 1.0
    return yarn_frequencies(wavelengths, base, scaling)


def llama3_frequencies(frequencies, scaling):
    """(D/2,) -> (D/2,): dimensions that turn less than low_freq_factor times over the original context are
    slowed by the factor, those that turn more than high_freq_factor times are not, between them in part."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling["factor"] + kept * frequencies


def yarn_frequencies(wavelengths, base, yarn):
    """Wavelengths (D/2,), RoPE's base, YaRN's settings -> rope_frequencies' result."""
    dim = 2 * len(wavelengths)
    factor, original = yarn["factor"], yarn["original_max_position_embeddings"]

    def correction_dim(rotations):  # the dimension that turns `rotations` times over the original context
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = correction_dim(yarn.get("beta_fast") or 32), correction_dim(yarn.get("beta_slow") or 1)
    if yarn.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, device="cpu").float() - low) / max(high - low, 0.001)).clamp(0, 1)
    kept = 1 - ramp
    frequencies = 1 / (factor * wavelengths) * (1 - kept) + 1 / wavelengths * kept

    def mscale(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = yarn.get("attention_factor")
    if attention_factor is None:
        m, m_all = yarn.get("mscale"), yarn.get("mscale_all_dim")
        attention_factor = mscale(m) / mscale(m_all) if m and m_all else mscale(1)
    return frequencies, attention_factor


def rope_tables(config, positions, dtype):
    """positions (T,) int64 -> cos and sin, each (T, 1, D) in `dtype`, computed in fp32. Dimensions d and
    d + D/2 are a pair (RoPE, arXiv 2104.09864)."""
    frequencies, factor = rope_frequencies(config)
    angles = positions[:, None].float() * frequencies.to(positions.device, non_blocking=True)  # (T, D/2)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x, cos, sin):
    """x (B, T, heads, D) -> the same shape and dtype with RoPE applied; cos and sin are rope_tables'."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


# -------------------------------------------------------------------------------------------------- attention


def causal_attention(q, k, v, lengths=None):
    """q (B, T, H, D), k and v (B, T, Hk, D) -> (B, T, H, D) in their dtype; each sequence attends to itself.
    q may be (B, 1, H, D), that of the last token, which attends to all.

    lengths: token counts of the documents that follow each other in a row; each attends to itself only. One
    call for each document needs no mask of T x T, does no work between documents, and runs everywhere
    (PyTorch's varlen_attn is for CUDA only).

    The flash kernel is called by name. SDPA would choose: from torch 2.11 on an H100 it prefers cuDNN's,
    which plans for 30 ms for each new length, unless vLLM was imported, which turns them off.
    """
    if lengths:
        documents = zip(*(x.split(lengths, dim=1) for x in (q, k, v)))
        return torch.cat([causal_attention(*document) for document in documents], dim=1)
    causal = q.size(1) == k.size(1)
    if q.is_cuda and q.dtype == torch.float32:  # for which there is no flash kernel; nothing trains in it
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
    return flash(q, k, v, causal)[0]


class Layout:
    """Index tensors for a group's completions, which lie one after the other in a row of N tokens. Documents
    in a row are treated as completions of a prompt of length 0.

    lengths: R_1 to R_G. shape: (G, R).
    positions (N,): RoPE positions; every completion continues at P.
    slots (N,): a token's place in a right-padded batch (G, R), flattened.
    predicted (n,): the tokens whose log-probabilities this rank computes; without context parallelism, all N.
    predictors (n,): for each of them, the row that predicts it, of [last prompt token | this rank's tokens]
    (parallel.Share.predictions).
    """

    def __init__(self, prompt_length, lengths, device, share):
        self.lengths, self.shape = lengths, (len(lengths), max(lengths))
        sizes = torch.tensor(lengths)
        starts = sizes.cumsum(0) - sizes  # (G,) first token of each completion among the N
        tokens = torch.arange(sum(lengths))  # (N,)
        offsets = tokens - starts.repeat_interleave(sizes)  # (N,) place within its completion
        owner = torch.arange(len(lengths)).repeat_interleave(sizes)  # (N,) which completion
        # A token is predicted by the one before it, row `token` of [last prompt token | N tokens]; the first
        # of a completion by the prompt's last, row 0.
        predicted, predictors = share.predictions(torch.where(offsets == 0, 0, tokens))
        self.positions, self.predicted, self.predictors, self.slots = (
            index.to(device, non_blocking=True)
            for index in (prompt_length + offsets, predicted, predictors, owner * max(lengths) + offsets)
        )

    def pad(self, x, own=slice(None)):
        """x (1, N, ...) -> (G, R, ...), with zeros after each completion. own: the slice of the N tokens that
        x has; the other tokens are zeros, too."""
        (G, R), slots = self.shape, self.slots[own]
        if len(slots) == G * R:  # equal lengths: nothing to pad, nothing to copy
            return x.view(G, R, *x.shape[2:])
        padded = x.new_zeros(G * R, *x.shape[2:])
        padded[slots] = x[0]
        return padded.view(G, R, *x.shape[2:])

    def unpad(self, x):
        """x (G, R, ...) -> (1, N, ...): `pad` undone."""
        flat = x.flatten(0, 1)
        return (flat if len(self.slots) == len(flat) else flat[self.slots])[None]


class GroupAttention(torch.autograd.Function):
    """q (1, N, H, D), k and v (1, N, Hk, D), prompt_k and prompt_v (1, P, Hk, D), Layout -> (1, N, H, D).

    The softmax over [prompt | own completion] follows from the softmax over each part. With l_part the
    log-sum-exp of a part's scores and l the logaddexp of both, out = sum of exp(l_part - l) * out_part.

    A flash kernel's backward recomputes probabilities as exp(score - l), and of the forward's results needs
    only out and l. Given the merged out and l, its result for a part is that part's contribution to the
    gradient of the whole softmax, exactly. On a GPU the flash kernel takes only bf16 and fp16.
    """

    @staticmethod
    def forward(ctx, q, k, v, prompt_k, prompt_v, layout):
        pad, unpad = layout.pad, layout.unpad
        far, far_lse, far_rest = flash(q, prompt_k, prompt_v, causal=False)
        own, own_lse, own_rest = flash(pad(q), pad(k), pad(v), causal=True)
        own, own_lse = unpad(own), unpad(own_lse)
        lse = torch.logaddexp(far_lse, own_lse)  # (1, N, H) fp32
        far_weight, own_weight = (far_lse - lse).exp()[..., None], (own_lse - lse).exp()[..., None]
        out = (far * far_weight + own * own_weight).to(q.dtype)
        ctx.save_for_backward(q, k, v, prompt_k, prompt_v, out, lse)
        ctx.layout, ctx.rests = layout, (far_rest, own_rest)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, prompt_k, prompt_v, out, lse = ctx.saved_tensors
        pad, unpad, (far_rest, own_rest) = ctx.layout.pad, ctx.layout.unpad, ctx.rests
        grad = grad.contiguous()
        far = flash_backward(grad, q, prompt_k, prompt_v, out, lse, far_rest, causal=False)
        far_grad_q, grad_prompt_k, grad_prompt_v = far
        # Padding: its scores and log-sum-exp are zeros, so its probabilities are finite and its gradients 0.
        own = flash_backward(pad(grad), pad(q), pad(k), pad(v), pad(out), pad(lse), own_rest, causal=True)
        own_grad_q, grad_k, grad_v = map(unpad, own)
        return far_grad_q + own_grad_q, grad_k, grad_v, grad_prompt_k, grad_prompt_v, None


def use_flash_attention_3():
    """From here on PyTorch's flash operators, which `flash` calls, are FlashAttention 3's on a GPU. Raises
    BadInput without a Hopper GPU, or without its package."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise BadInput("--flash-attention 3 needs a Hopper GPU (H100, H200, GH200), and there is none")
    try:
        activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError) as error:
        fix = "install flash-attn-3, docs/scale.md says from where"
        raise BadInput(
            f"--flash-attention 3 needs the module flash_attn_interface: {fix} ({error})"
        ) from error


def flash(q, k, v, causal):
    """One flash kernel: q (B, T, H, D), k and v (B, S, Hk, D) -> out (B, T, H, D), log-sum-exp of the scaled
    scores (B, T, H) fp32, and a list of what else the kernel's backward needs.

    PyTorch's public attention call does not return the log-sum-exp, so this calls the operators behind it.
    They take grouped queries (Hk < H) as they are, and autograd knows `out`'s derivative.
    """
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    if q.is_cpu:
        out, lse = FLASH_ON_CPU(*heads_first, 0.0, causal)
        rest = []
    else:
        out, lse, *rest = FLASH(*heads_first, 0.0, causal)
        rest = rest[:6]  # lengths (none), longest T and S, state of the dropout that is not used
    return out.transpose(1, 2), lse.transpose(1, 2), rest


def flash_backward(grad, q, k, v, out, lse, rest, causal):
    """grad (B, T, H, D), and flash's q, k, v, out, lse and rest -> gradients of q, k and v, shaped like them.
    `out` and `lse` may be those of a softmax over more keys than k."""
    heads_first = [x.transpose(1, 2) for x in (grad, q, k, v, out, lse)]
    heads_first[5] = heads_first[5].contiguous()  # (B, H, T), the kernel's layout
    if q.is_cpu:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = backward(*heads_first, 0.0, causal)
    else:
        *lengths, state, unused = rest
        backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
        gradients = backward(*heads_first, *lengths, 0.0, causal, state, unused)
    return tuple(gradient.transpose(1, 2) for gradient in gradients)
