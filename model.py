"""Qwen3, Qwen2 and Llama by hand: blocks, log-probabilities of a group that reads its prompt once, activation
statistics.

    model = Qwen3.from_pretrained("assets/tiny")
    logits = model(input_ids)                                   # (B, T) -> (B, T, V), a causal language model
    logprobs = model.group_logprobs(prompt_ids, completions)    # a prompt and its completions, differentiable
    model.save_pretrained("runs/mine/checkpoint")

Training takes group_logprobs apart, so that memory does not grow with the group (two-stage backward):

    prompt = model.read(prompt_ids)                             # once: keys and values of every layer
    leaves = prompt.detach()                                    # the same, as leaves of the passes' graphs
    for part in passes:                                         # a few completions at a time
        loss(model.completion_logprobs(leaves, part)).backward()    # adds to the gradient of the leaves
    prompt.backward(leaves)                                     # and that gradient once through the prompt

Parameter names are Hugging Face's. The families differ in two switches of the config: Qwen3 has q_norm and
k_norm, Qwen2 (also 2.5) biases on q, k and v, Llama neither. What is not supported is refused by name.
Qwen3Config, config.json and the files of weights are in core/checkpoint.py, attention in core/attention.py.

Shapes: B sequences, T tokens, C hidden size, H query heads, Hk key/value heads, D head size, V vocabulary,
P prompt tokens, G completions of R_i tokens, N = sum(R_i).
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from core import lora
from core.attention import (
    FLASH,
    FLASH_ON_CPU,
    GroupAttention,
    Layout,
    causal_attention,
    rope_tables,
    rotate,
)
from core.checkpoint import Qwen3Config, check_weights, full_tensor, load_weights, save_checkpoint
from core.parallel import Share

HEAD_CHUNK_ELEMENTS = 2**27  # logits that exist at a time: 512 MiB in fp32, 883 tokens of Qwen3's vocabulary


# ----------------------------------------------------------------------------------------------------- layers


def rms_norm(x, weight, eps):
    """x (..., size), weight (size,) -> as x."""
    wide = x.float()  # statistics in fp32, the product in the compute dtype, as Hugging Face and vLLM do
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def swiglu(gate, up):
    """(..., F), (..., F) -> (..., F)."""
    return F.silu(gate) * up


def compile_elementwise():
    """From here on norms, rotation and SwiGLU are one kernel each, forward and backward, in every model of
    this process. torch.compile makes them when they are first called, with Triton, on a CPU with a C++
    compiler. Up to rounding they compute the same: where bf16 is rounded several times on the way, they round
    once."""
    for owner, name in ((RMSNorm, "norm"), (Attention, "rotate"), (MLP, "gate")):
        setattr(owner, name, staticmethod(torch.compile(getattr(owner, name), dynamic=True)))


class RMSNorm(nn.Module):
    norm = staticmethod(rms_norm)

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return self.norm(x, self.weight, self.eps)


class Attention(nn.Module):
    rotate = staticmethod(rotate)

    def __init__(self, config):
        super().__init__()
        C, H, Hk, D = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.D = D
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, Hk * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, Hk * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        norm = partial(RMSNorm, D, config.rms_norm_eps) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x, cos, sin, squares, prompt, layout, share, last_only):
        heads = -1, (-1, self.D)
        q, k, values = (
            self.q_proj(x).unflatten(*heads),
            self.k_proj(x).unflatten(*heads),
            self.v_proj(x),
        )  # (B, T, heads, D)
        q_normed, k_normed = self.q_norm(q), self.k_norm(k)
        if squares and not squares.full:
            measured = (q, k) if squares.site == "proj" else (q_normed, k_normed)
            measured = (x.detach() for x in measured)
            squares.fill(*(layout.pad(x, share.own) if layout else x for x in measured))
        k, share_of_q = self.rotate(k_normed, cos, sin), share
        if last_only:
            share_of_q, own = share.last()
            q_normed, cos, sin = q_normed[:, own], cos[own], sin[own]
        q = self.rotate(q_normed, cos, sin)
        q, k, values = share_of_q.to_heads(q), share.to_heads(k), share.to_heads(values)
        v = values.unflatten(*heads)
        if prompt is None:
            y = causal_attention(q, k, v, layout and layout.lengths)
        else:
            y = GroupAttention.apply(q, k, v, prompt[0], prompt[1].unflatten(*heads), layout)
        return (
            self.o_proj(share_of_q.to_tokens(y).flatten(2)),
            k,
            values,
        )  # not v: FSDP2 warns of outputs that are views


class MLP(nn.Module):
    gate = staticmethod(swiglu)

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(self.gate(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """x (B, T, C), RoPE tables (T, 1, D) -> x (B, T, C), this layer's keys (B, T, Hk, D) and values
    (B, T, Hk * D). squares: this layer's saliency.Squares, or None.

    With `prompt`, this layer's keys and values of a prompt, and a Layout, x holds completions of that prompt;
    with a Layout alone, documents that do not see each other. In a context group x and the tables are of the
    rank's Share of the tokens, keys and values of all tokens and the rank's heads. last_only: of x only the
    last token comes out, (B, 1, C), or (B, 0, C) on ranks that do not have it.
    """

    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, squares, prompt, layout, share, last_only):
        how = squares, prompt, layout, share, last_only
        attended, k, v = self.self_attn(self.input_layernorm(x), cos, sin, *how)
        x = (x[:, share.last()[1]] if last_only else x) + attended
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class Head(nn.Module):
    """Hidden states -> logits, or straight to log-probabilities without ever holding all logits."""

    def __init__(self, config):
        super().__init__()
        self.chunk = max(1, HEAD_CHUNK_ELEMENTS // config.vocab_size)  # tokens
        self.weight = None
        if not config.tie_word_embeddings:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden, targets=None, temperature=1.0, tied=None):
        """hidden (..., C) -> logits (..., V); or with targets (N,), hidden (N, C) -> log-probabilities (N,)
        and entropies (N,), see TokenLogprobs. `tied`: the embedding (V, C), used when the head has no weight
        of its own."""
        weight = tied if self.weight is None else self.weight
        if targets is None:
            return F.linear(hidden, weight)
        return TokenLogprobs.apply(hidden, weight, targets, temperature, self.chunk)


class TokenLogprobs(torch.autograd.Function):
    """log softmax(logits / temperature) at the targets, as the sampler computes it, and its entropy.

    hidden (N, C), weight (V, C), targets (N,) int64 -> log-probabilities (N,) fp32, entropies (N,) fp32 in
    nats. Logits exist for `chunk` tokens at a time, in forward and again in backward, which needs the last
    chunk first and so finds it still there. Over the temperature, d logprob / d logit_j = [j = target] - p_j
    and d entropy / d logit_j = -p_j (log p_j + entropy).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        logprobs, entropies, logz = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        for rows in TokenLogprobs.chunks(len(hidden), chunk):
            table = F.linear(hidden[rows], weight).float().div_(temperature)  # (n, V), logits
            torch.logsumexp(table, -1, out=logz[rows])
            table.sub_(logz[rows, None])  # log p
            logprobs[rows] = table.gather(-1, targets[rows, None])[:, 0]
            entropies[rows] = table.exp().mul_(table).sum(-1).neg_()
        ctx.save_for_backward(hidden, weight, targets, logz, entropies)
        ctx.temperature, ctx.chunk, ctx.last = temperature, chunk, table
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropies):
        hidden, weight, targets, logz, entropies = ctx.saved_tensors
        table, ctx.last = ctx.last, None
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(logz)
        for rows in reversed(TokenLogprobs.chunks(len(hidden), ctx.chunk)):
            if table is None:
                table = F.linear(hidden[rows], weight).float().div_(ctx.temperature).sub_(logz[rows, None])
            grad = table.exp().neg_()  # (n, V)
            if grad_entropies is None:
                grad.mul_(grad_logprobs[rows, None])
            else:
                table.add_(entropies[rows, None]).mul_(grad_entropies[rows, None]).add_(
                    grad_logprobs[rows, None]
                )
                grad.mul_(table)
            grad.scatter_add_(-1, targets[rows, None], grad_logprobs[rows, None])
            grad, table = grad.div_(ctx.temperature).to(weight.dtype), None
            torch.mm(grad, weight, out=grad_hidden[rows])
            if not ctx.needs_input_grad[1]:  # a frozen head
                continue
            if grad_weight is None:
                grad_weight = grad.t() @ hidden[rows]
            else:
                grad_weight.addmm_(grad.t(), hidden[rows])
        return grad_hidden, grad_weight, None, None, None

    @staticmethod
    def chunks(tokens, chunk):
        return [
            slice(start, start + chunk) for start in range(0, max(1, tokens), chunk)
        ]  # no tokens: a chunk of none


# ------------------------------------------------------------------------------------------------------ model


class Prompt(NamedTuple):
    """What completions need of the prompt they follow: its last token's hidden state (1, C); of each layer
    the keys (1, P, Hk, D), the values (1, P, Hk * D) and, if a Tracker is active, the Squares. In a context
    group of n ranks the last one has the hidden state, others (0, C), and keys and values are of Hk / n
    heads."""

    length: int
    last: torch.Tensor
    keys: list
    values: list
    squares: list

    def detach(self):
        """The same values as leaves of new graphs, in which gradients gather."""
        leaf = lambda x: x.detach().requires_grad_(x.requires_grad)  # noqa: E731
        return Prompt(
            self.length, leaf(self.last), [*map(leaf, self.keys)], [*map(leaf, self.values)], self.squares
        )

    def backward(self, leaves):
        """Backpropagate what gathered in `leaves`, which `detach` gave, through the prompt's forward."""
        outputs, ends = [self.last, *self.keys, *self.values], [leaves.last, *leaves.keys, *leaves.values]
        pairs = [(output, end.grad) for output, end in zip(outputs, ends) if output.requires_grad]
        torch.autograd.backward(*zip(*pairs))  # without those of frozen weights alone


@torch.no_grad()
def logprobs_in_passes(model, prompt_ids, completions, passes, temperature=1.0):
    """A prompt's completions through a model, Qwen3 or lora.Base, without training it. prompt_ids (P,),
    completions: G times (R_i,), both int64; passes: lists of their indices -> G times (R_i,) fp32."""
    prompt, result = model.read(prompt_ids), [None] * len(completions)
    for part in passes:
        own = [completions[i] for i in part]
        logprobs, _ = model.completion_logprobs(prompt, own, temperature)
        for i, each in zip(part, logprobs.split([len(completion) for completion in own])):
            result[i] = each
    return result


class Qwen3(nn.Module):
    """A model of any of core.checkpoint's FAMILIES.

    `tracker`: set by saliency.Tracker, receives every layer's sums of squares. `checkpointing`: recompute
    blocks in backward, with `attention_recompute` attention too; without it, its results are kept. `context`:
    the ProcessGroup whose ranks share a group's tokens (core/parallel.py), or None. `low_rank`: the
    lora.Settings of what trains instead of the weights, or None."""

    def __init__(self, config):
        super().__init__()
        self.config, self.tracker, self.context, self.low_rank = config, None, None, None
        self.checkpointing, self.attention_recompute = False, True
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = Head(config)

    def compute_as(self, config):
        """Take what changes only speed, memory and rounding from a script's Config."""
        self.checkpointing, self.attention_recompute = config.checkpointing, config.attention_recompute
        if config.compile:
            compile_elementwise()

    def forward(self, input_ids):
        """input_ids (B, T) -> logits (B, T, V), each row a sequence of its own."""
        hidden = self.model.norm(self._rows(input_ids))
        return self.lm_head(hidden, tied=self._tied)

    def logprobs(self, input_ids, mask, lengths=None):
        """input_ids (B, T), mask (B, T) bool -> log-probabilities (N,) fp32 of the masked tokens, row by row.

        The dense layout: for SFT, and the oracle of group_logprobs. `lengths`: input_ids (1, T) is documents
        of these numbers of tokens packed into one row, each read as if it were alone. The mask must be False
        at the first token of every sequence or document (nothing predicts it).
        """
        hidden = self._rows(input_ids, lengths)
        hidden = self.model.norm(hidden[:, :-1][mask[:, 1:]])  # (N, C)
        return self.lm_head(hidden, input_ids[mask], tied=self._tied)[0]

    def group_logprobs(self, prompt_ids, completions, temperature=1.0, entropy=False):
        """log pi(token | prompt, earlier tokens) of every completion token, by one forward of P + N tokens.

        prompt_ids (P,) int64, completions: list of (R_i,) int64 -> list of (R_i,) fp32, differentiable; with
        entropy=True also a list of (R_i,) fp32 entropies. temperature divides the logits, as in the sampler.
        Raises ValueError for an empty prompt or completion.
        """
        results = self.completion_logprobs(self.read(prompt_ids), completions, temperature)
        logprobs, entropies = (list(result.split([len(c) for c in completions])) for result in results)
        return (logprobs, entropies) if entropy else logprobs

    def read(self, prompt_ids):
        """The first stage: prompt_ids (P,) int64 -> Prompt, differentiable. ValueError for no tokens."""
        if not len(prompt_ids):
            raise ValueError("a prompt needs at least one token: nothing else predicts a completion's first")
        positions = torch.arange(len(prompt_ids), device=prompt_ids.device)
        share, cache = Share(len(prompt_ids), self.context), []
        x, squares = self._blocks(prompt_ids[None], positions, cache=cache, share=share)
        return Prompt(len(prompt_ids), x[0], *map(list, zip(*cache)), squares)

    def completion_logprobs(self, prompt, completions, temperature=1.0):
        """The second stage: Prompt, list of (R_i,) int64 -> log-probabilities (N,) and entropies (N,) fp32,
        one completion after the other. Any of a prompt's completions may go in any call; a Tracker must see
        both stages. The ranks of a context group give the same completions, and each gets the whole result.

        Raises ValueError for an empty completion, or none.
        """
        lengths = [len(completion) for completion in completions]
        if not lengths or not min(lengths):
            raise ValueError(f"completions need at least one token each, got lengths {lengths}")
        targets = torch.cat(list(completions))  # (N,)
        share = Share(len(targets), self.context)
        layout = Layout(prompt.length, lengths, targets.device, share)
        x, squares = self._blocks(targets[None], layout.positions, prompt, layout, share=share)
        if self.tracker:
            self.tracker.add(squares, prompt.squares)
        hidden = self.model.norm(
            torch.cat((prompt.last, x[0]))[layout.predictors]
        )  # (N, C), a rank's share of it
        results = self.lm_head(hidden, targets[layout.predicted], temperature, self._tied)
        return tuple(share.whole(result, layout.predicted) for result in results)

    @property
    def _tied(self):
        """The embedding, for a head without a weight of its own. Others get None: FSDP2 would make a gradient
        of zeros of it in every pass, 1.2 GiB at 8B."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else None

    def _rows(self, input_ids, lengths=None):
        """input_ids (B, T), each row a sequence of its own, or (1, T) of documents of `lengths` -> hidden
        states (B, T, C) before the final norm."""
        layout = Layout(0, lengths, input_ids.device, Share(input_ids.size(1))) if lengths else None
        positions = layout.positions if layout else torch.arange(input_ids.size(1), device=input_ids.device)
        x, squares = self._blocks(input_ids, positions, layout=layout)
        if self.tracker:
            self.tracker.add(squares)
        return x

    def _blocks(self, ids, positions, prompt=None, layout=None, cache=None, share=None):
        """ids (B, T), positions (T,) -> hidden states (B, T, C) and each layer's Squares (or None), of
        `share` of the tokens if given; the list `cache`, if given, receives each layer's keys and values, and
        only the last token's hidden state comes out: nobody asks the last layer for the others'."""
        share = share or Share(ids.size(1))
        x = self.model.embed_tokens(ids[:, share.own])  # (B, T, C)
        cos, sin = rope_tables(self.config, positions[share.own], x.dtype)
        squares = [None] * len(self.model.layers)
        if self.tracker:  # a completion's first token is not its sequence's, nor is that of a later share
            squares = self.tracker.new_squares(
                len(self.model.layers), has_first=not prompt and share.start == 0
            )
        recompute, how = self.checkpointing and torch.is_grad_enabled(), {"use_reentrant": False}
        if not self.attention_recompute:
            how["context_fn"] = partial(create_selective_checkpoint_contexts, [FLASH, FLASH_ON_CPU])
        for i, block in enumerate(self.model.layers):
            past = (prompt.keys[i], prompt.values[i]) if prompt else None
            last_only = cache is not None and i == len(self.model.layers) - 1
            inputs = x, cos, sin, squares[i], past, layout, share, last_only
            x, k, v = checkpoint(block, *inputs, **how) if recompute else block(*inputs)
            if cache is not None:
                cache.append((k, v))
        return x, squares

    # ------------------------------------------------------------------------------------------- checkpoints

    @classmethod
    def check_weights(cls, config, directory):
        """Raises BadInput unless the tensors of `directory` are those of this config; reads headers only."""
        with torch.device("meta"):
            check_weights(cls(config), directory)

    @classmethod
    def from_pretrained(
        cls,
        directory,
        dtype=torch.float32,
        device="cpu",
        mesh=None,
        compute_dtype=None,
        context=None,
        low_rank=None,
    ):
        """Build the model and fill it from safetensors, tensor by tensor (never two copies in memory).

        With a DeviceMesh, parameters are sharded over it by FSDP2 before a weight is read, and each rank
        reads only its own rows; `compute_dtype` is then what forward and backward run in, `dtype` that of the
        masters and gradients. `context`: the ProcessGroup that shares prompts. `low_rank`: lora.Settings;
        the weights are then frozen, with a mesh in compute_dtype, and masters are those of the update. Raises
        BadInput for a missing directory, another architecture, missing, misshapen or unexpected tensors.
        """
        config = Qwen3Config.from_pretrained(directory)
        model = cls.empty(config, dtype, device, mesh, compute_dtype, low_rank)
        model.context = context
        load_weights(model, directory)
        if low_rank:
            lora.start(model)
        return model

    @classmethod
    def from_config(cls, config, dtype=torch.float32, device="cpu", generator=None):
        """Random weights: normal with config.initializer_range, norms 1, drawn on the CPU by `generator`."""
        model = cls.empty(config, dtype, device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.fill_(1)
                else:
                    noise = torch.empty(parameter.shape).normal_(
                        0, config.initializer_range, generator=generator
                    )
                    parameter.copy_(noise)
        return model

    @classmethod
    def empty(cls, config, dtype=torch.float32, device="cpu", mesh=None, compute_dtype=None, low_rank=None):
        """The modules with uninitialised memory, sharded over `mesh` if given."""
        with torch.device("meta"):
            model = cls(config).to(compute_dtype if low_rank and mesh is not None else dtype)
            if low_rank:
                lora.add(model, low_rank, dtype)
        if mesh is not None:
            policy = MixedPrecisionPolicy(
                compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            for block in model.model.layers:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            if not config.tie_word_embeddings:
                fully_shard(model.lm_head, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            for method in (
                "read",
                "completion_logprobs",
                "logprobs",
            ):  # FSDP2's hooks otherwise run on forward only
                register_fsdp_forward_method(model, method)
        return model.to_empty(device=device)

    def save_pretrained(self, directory, dtype=None, companions_from=None, notes=None, read=None):
        """Write a Hugging Face directory, see checkpoint.save_checkpoint; with LoRA the weights have their
        update, and adapter/ in it is the update alone, as PEFT's. read(name) -> a whole parameter, in place
        of the model's own, which may then be on the meta device. Every rank must call it."""
        read = read or (lambda name: full_tensor(self.get_parameter(name)))
        merged, adapter = partial(lora.merged, self, read=read), lora.adapter(self, companions_from, read)
        save_checkpoint(self, directory, merged, dtype, companions_from, notes, adapter)
