"""Qwen3 by hand: blocks, shared-prefix log-probabilities, activation statistics.

    model = Qwen3.from_pretrained("assets/tiny")
    logits = model(input_ids)                                # (B, T) -> (B, T, V), a plain causal language model
    logprobs = model.group_logprobs(prompt_ids, completions) # what training uses: the prompt passes through once
    model.save_pretrained("runs/mine/checkpoint")

Parameter names are Hugging Face's. All dense Qwen3 sizes are supported; what is not is refused by name.

Shapes: B sequences, T tokens, C hidden size, H query heads, Hk key/value heads, D head size, V vocabulary, P prompt tokens,
G completions of R_i tokens, N = sum(R_i).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from checkpoint import Qwen3Config, load_weights, save_checkpoint

HEAD_CHUNK_ELEMENTS = 2**27  # logits that exist at a time: 512 MiB in fp32, 883 tokens of Qwen3's vocabulary

# ---------------------------------------------------------------------------------------------------- rotary positions


def rope_frequencies(config):
    """Inverse frequencies (D/2,) fp32 and the factor on cos and sin (1.0 without YaRN; YaRN is arXiv 2309.00071)."""
    dim, base, yarn = config.head_dim, config.rope_theta, config.rope_scaling
    wavelengths = base ** (torch.arange(0, dim, 2, device="cpu").float() / dim)
    if yarn is None:
        return 1.0 / wavelengths, 1.0
    factor, original = yarn["factor"], yarn["original_max_position_embeddings"]

    def correction_dim(rotations):  # the dimension that turns `rotations` times over the original context
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = correction_dim(yarn.get("beta_fast") or 32), correction_dim(yarn.get("beta_slow") or 1)
    if yarn.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, device="cpu").float() - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = (1 - ramp) / wavelengths + ramp / (factor * wavelengths)

    def mscale(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = yarn.get("attention_factor")
    if attention_factor is None:
        m, m_all = yarn.get("mscale"), yarn.get("mscale_all_dim")
        attention_factor = mscale(m) / mscale(m_all) if m and m_all else mscale(1)
    return frequencies, attention_factor


def rotate(x, cos, sin):
    """Apply RoPE to x (B, heads, T, D); cos and sin (T, D). Dimension d turns together with d + D/2."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


# ----------------------------------------------------------------------------------------------- shared-prefix layout


class GroupLayout:
    """Where things are in [prompt | completion 1 | ... | completion G], T = P + N tokens in one row.

    positions (T,): every completion continues at P. predictors (N,): the token whose hidden state predicts each
    completion token. pad (G, R) and unpad (N,): between the flat completions and a right-padded (G, R) batch.
    """

    def __init__(self, prompt_length, lengths, device):
        self.prompt_length, self.lengths = prompt_length, lengths
        sizes = torch.tensor(lengths)
        starts = sizes.cumsum(0) - sizes  # (G,) first token of each completion among the N
        offsets = torch.arange(int(sizes.sum())) - starts.repeat_interleave(sizes)  # (N,) place within its completion
        within = torch.arange(int(sizes.max()))  # (R,)
        pad = (starts[:, None] + within).clamp(max=len(offsets) - 1)  # padding repeats a later token; never attended
        owner = torch.arange(len(lengths)).repeat_interleave(sizes)  # (N,) which completion
        flat = torch.arange(len(offsets)) + prompt_length - 1
        positions = torch.cat((torch.arange(prompt_length), prompt_length + offsets))
        predictors = torch.where(offsets == 0, prompt_length - 1, flat)
        unpad = owner * len(within) + offsets
        self.positions, self.predictors, self.pad, self.unpad = (
            index.to(device, non_blocking=True) for index in (positions, predictors, pad, unpad)
        )


def attend(q, k, v, layout=None):
    """Causal attention; q (B, H, T, D), k and v (B, Hk, T, D) -> (B, H, T, D). The only attention call of the project.

    With a GroupLayout (B = 1), prompt tokens attend causally to the prompt; completion i to the whole prompt and
    causally to itself. Completions become a right-padded batch (G, H, R, D) over keys [prompt | own completion]: padding
    sits behind every real token, so a causal mask aligned to the lower right already hides it.
    """
    gqa = q.size(1) != k.size(1)
    if layout is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    P, (G, R) = layout.prompt_length, layout.pad.shape

    def group(x):  # (1, heads, T, D) -> (G, heads, R, D)
        return x[0, :, P:][:, layout.pad].transpose(0, 1)

    def with_prompt(x):  # (1, Hk, T, D) -> (G, Hk, P + R, D)
        return torch.cat((x[:, :, :P].expand(G, -1, -1, -1), group(x)), dim=2)

    prompt = F.scaled_dot_product_attention(q[:, :, :P], k[:, :, :P], v[:, :, :P], is_causal=True, enable_gqa=gqa)
    mask = causal_lower_right(R, P + R)
    own = F.scaled_dot_product_attention(group(q), with_prompt(k), with_prompt(v), attn_mask=mask, enable_gqa=gqa)
    own = own.transpose(0, 1).flatten(1, 2)[:, layout.unpad]  # (H, N, D)
    return torch.cat((prompt, own[None]), dim=2)


@torch.no_grad()
def sequence_norms(x, layout):
    """L2 norm over the tokens of each sequence, summed over sequences; x (B, T, heads, D) -> (heads, D) fp32.

    The inner sum of LongAct's M (paper, section 3). With a GroupLayout, sequence i is prompt + completion i: the
    prompt's sum of squares is taken once and shared, which gives exactly what one row per completion would.
    """
    if layout is None:
        return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).sum(0)
    P = layout.prompt_length
    prompt = torch.linalg.vector_norm(x[0, :P], dim=0, dtype=torch.float32).square()  # (heads, D)
    own = [torch.linalg.vector_norm(c, dim=0, dtype=torch.float32) for c in x[0, P:].split(layout.lengths)]
    return (prompt + torch.stack(own).square()).sqrt().sum(0)


# --------------------------------------------------------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = x.float()  # statistics in fp32, the product in the compute dtype, as Hugging Face and vLLM do
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, H, Hk, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.D = D
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, Hk * D, bias=False)
        self.v_proj = nn.Linear(C, Hk * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.rms_norm_eps)
        self.k_norm = RMSNorm(D, config.rms_norm_eps)

    def forward(self, x, cos, sin, layout, site):
        heads = (*x.shape[:2], -1, self.D)
        q, k, v = (proj(x).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, heads, D)
        q_normed, k_normed = self.q_norm(q), self.k_norm(k)
        norms = None
        if site is not None:
            q_site, k_site = (q, k) if site == "proj" else (q_normed, k_normed)
            norms = sequence_norms(q_site, layout), sequence_norms(k_site, layout)
        q, k, v = (y.transpose(1, 2) for y in (q_normed, k_normed, v))  # (B, heads, T, D)
        y = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, layout)
        return self.o_proj(y.transpose(1, 2).flatten(2)), norms


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x (B, T, C) -> x (B, T, C) and this layer's activation norms (None unless `site` is given).

    The norms are an output, not a hook's side effect: what activation checkpointing recomputes in backward is dropped.
    """

    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, layout, site):
        attended, norms = self.self_attn(self.input_layernorm(x), cos, sin, layout, site)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), norms


class Head(nn.Module):
    """Hidden states -> logits, or straight to log-probabilities without ever holding all logits."""

    def __init__(self, config):
        super().__init__()
        self.chunk = max(1, HEAD_CHUNK_ELEMENTS // config.vocab_size)  # tokens
        self.weight = None
        if not config.tie_word_embeddings:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden, targets=None, temperature=1.0, entropy=False, tied=None):
        """hidden (..., C) -> logits (..., V); or with targets (N,), hidden (N, C) -> log-probabilities (N,) fp32 and
        entropies (N,) fp32 (or None), a chunk of tokens at a time, recomputed in backward. `tied`: embedding (V, C)."""
        weight = tied if self.weight is None else self.weight
        if targets is None:
            return F.linear(hidden, weight)
        chunks = zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True)
        results = [checkpoint(token_logprobs, h, weight, t, temperature, entropy, use_reentrant=False) for h, t in chunks]
        logprobs, entropies = zip(*results, strict=True)
        return torch.cat(logprobs), torch.cat(entropies) if entropy else None


def token_logprobs(hidden, weight, targets, temperature, entropy):
    """log softmax(logits / temperature) at the targets, as the sampler computes it, and the entropy of that softmax."""
    logits = F.linear(hidden, weight).float() / temperature  # (n, V)
    logz = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - logz
    return logprobs, logz - ((logits - logz[:, None]).exp() * logits).sum(-1) if entropy else None


# ---------------------------------------------------------------------------------------------------------------- model


class Qwen3(nn.Module):
    """`tracker`: set by saliency.Tracker, receives every layer's activation norms. `checkpointing`: recompute blocks."""

    def __init__(self, config):
        super().__init__()
        self.config, self.tracker, self.checkpointing = config, None, False
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = Head(config)

    def forward(self, input_ids):
        """input_ids (B, T) -> logits (B, T, V), each row a sequence of its own."""
        positions = torch.arange(input_ids.size(1), device=input_ids.device)
        hidden = self.model.norm(self._blocks(input_ids, positions, None, len(input_ids)))
        return self.lm_head(hidden, tied=self.model.embed_tokens.weight)

    def logprobs(self, input_ids, mask):
        """input_ids (B, T), mask (B, T) bool -> log-probabilities (N,) fp32 of the masked tokens, in row order.

        The dense layout: for SFT, and the oracle of group_logprobs. mask[:, 0] must be False (nothing predicts it).
        """
        positions = torch.arange(input_ids.size(1), device=input_ids.device)
        hidden = self._blocks(input_ids, positions, None, len(input_ids))
        hidden = self.model.norm(hidden[:, :-1][mask[:, 1:]])  # (N, C)
        return self.lm_head(hidden, input_ids[mask], tied=self.model.embed_tokens.weight)[0]

    def group_logprobs(self, prompt_ids, completions, temperature=1.0, entropy=False):
        """log pi(token | prompt, earlier tokens) of every completion token, in one forward over P + sum(R_i) tokens.

        prompt_ids (P,) int64, completions: list of (R_i,) int64 -> list of (R_i,) fp32, differentiable; with
        entropy=True also a list of (R_i,) fp32 entropies. temperature divides the logits, as in the sampler.
        Raises ValueError for an empty prompt or completion.
        """
        lengths = [len(completion) for completion in completions]
        if not len(prompt_ids) or not lengths or not min(lengths):
            raise ValueError(f"group_logprobs needs a prompt and completions with tokens, got lengths {lengths}")
        layout = GroupLayout(len(prompt_ids), lengths, prompt_ids.device)
        targets = torch.cat(list(completions))  # (N,)
        ids = torch.cat((prompt_ids, targets))[None]  # (1, T)
        hidden = self._blocks(ids, layout.positions, layout, len(lengths))
        hidden = self.model.norm(hidden[0, layout.predictors])  # (N, C)
        tied = self.model.embed_tokens.weight
        logprobs, entropies = self.lm_head(hidden, targets, temperature, entropy, tied)
        logprobs = list(logprobs.split(lengths))
        return (logprobs, list(entropies.split(lengths))) if entropy else logprobs

    def _blocks(self, ids, positions, layout, sequences):
        x = self.model.embed_tokens(ids)  # (B, T, C)
        frequencies, factor = rope_frequencies(self.config)
        angles = positions[:, None].float() * frequencies.to(ids.device, non_blocking=True)  # (T, D/2)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)  # (T, D)
        site = self.tracker.site if self.tracker else None
        recompute = self.checkpointing and torch.is_grad_enabled()
        norms = []
        for block in self.model.layers:
            if recompute:
                x, layer_norms = checkpoint(block, x, cos, sin, layout, site, use_reentrant=False)
            else:
                x, layer_norms = block(x, cos, sin, layout, site)
            norms.append(layer_norms)
        if self.tracker:
            self.tracker.add(norms, sequences)
        return x

    # ------------------------------------------------------------------------------------------------------ checkpoints

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, device="cpu", mesh=None, compute_dtype=None):
        """Build the model and fill it from safetensors, tensor by tensor (never two copies in memory).

        With a DeviceMesh, parameters are sharded over it by FSDP2 before a weight is read, and each rank reads only its
        own rows; `compute_dtype` is then what forward and backward run in, `dtype` that of the masters and gradients.
        Raises BadInput for a missing directory, another architecture, missing, misshapen or unexpected tensors.
        """
        model = cls.empty(Qwen3Config.from_pretrained(directory), dtype, device, mesh, compute_dtype)
        load_weights(model, directory)
        return model

    @classmethod
    def from_config(cls, config, dtype=torch.float32, device="cpu", generator=None):
        """Random weights: normal with config.initializer_range, norms 1, drawn on the CPU from `generator`."""
        model = cls.empty(config, dtype, device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.fill_(1)
                else:
                    noise = torch.empty(parameter.shape).normal_(0, config.initializer_range, generator=generator)
                    parameter.copy_(noise)
        return model

    @classmethod
    def empty(cls, config, dtype=torch.float32, device="cpu", mesh=None, compute_dtype=None):
        """The modules with uninitialised memory, sharded over `mesh` if given."""
        with torch.device("meta"):
            model = cls(config).to(dtype)
        if mesh is not None:
            policy = MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            for block in model.model.layers:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            if not config.tie_word_embeddings:
                fully_shard(model.lm_head, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            for method in ("group_logprobs", "logprobs"):  # FSDP2's hooks otherwise run on forward only
                register_fsdp_forward_method(model, method)
        return model.to_empty(device=device)

    def save_pretrained(self, directory, dtype=None, companions_from=None):
        """Write a Hugging Face directory, see checkpoint.save_checkpoint. Every rank must call it."""
        save_checkpoint(self, directory, dtype, companions_from)
