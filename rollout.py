"""Completions from vLLM, in this process: prompts -> groups of completions, with log-probabilities.

One engine per data-parallel rank; ranks of one tensor-parallel group hold one engine together and must ask it
for the same prompts. A group is one request with n = G: the prompt's KV cache is computed once and shared.
`sync` gives the engine the trainer's weights; it is the only function that changes them. `clamp` holds
activations, for the perturbation experiment.
"""

import math
import os
import random
import re
import warnings
from dataclasses import dataclass, replace
from functools import cached_property, partial

# vLLM reads these when it is imported. In-process engines are what torchrun's ranks and sync() need.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer keeps its cores
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

warnings.filterwarnings("ignore", message="`torch.distributed.reduce_op` is deprecated")  # vLLM's, on import

import numpy  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

from base import bars  # noqa: E402
from base.cli import BadInput  # noqa: E402
from core import lora, memory  # noqa: E402
from core.checkpoint import Qwen3Config  # noqa: E402


def rope_overrides(config):
    """vLLM's hf_overrides for a Qwen3Config with YaRN; {} for other RoPE types, which vLLM reads itself.
    vLLM 0.32 wants rope_theta inside, and takes max_position_embeddings for the length after scaling, which
    Qwen3's published YaRN settings leave at 40960."""
    if config.rope_scaling is None or config.rope_scaling["rope_type"] != "yarn":
        return {}
    rope = {**config.rope_scaling, "rope_theta": config.rope_theta}
    return {"rope_parameters": rope, "max_position_embeddings": config.context_length}


def cache_bytes(config, context_length, dtype):
    """Keys and values that vLLM reserves on a CPU, where it touches all of it at once: for 131,072 tokens, or
    a text if that is longer, and at most 1 GiB. VLLM_CPU_KVCACHE_SPACE, in GiB, has the last word."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # of a token
    return min(2**30, max(2**17, context_length) * numbers * getattr(torch, dtype).itemsize)


def why_not_started(error, context_length, cuda):
    """What vLLM's start has raised -> one line with the cause and the fix, where we know one."""
    text = " ".join(str(error).split())
    reason = re.sub(r"^\d+ validation errors? for \w+ Value error, ", "", text)[:300]
    start = f"vLLM cannot start with {context_length} tokens a text"
    if "KV cache" in text or "cache blocks" in text:
        memory = "raise --vllm-share" if cuda else "set VLLM_CPU_KVCACHE_SPACE to more GiB"
        what = f"{start}, too little memory for their keys and values"
        return f"{what}: {memory}, or allow fewer tokens ({reason})"
    if "less than desired GPU memory" in text or "out of memory" in text:
        return f"{start}, too little free GPU memory: lower --vllm-share, or free the GPU ({reason})"
    return f"{start}: {reason}"


def cuda_options(share, eager, sequences, kv_cache, offload_graphs):
    """vLLM's settings on a GPU, see Rollout. By default it generates 1,024 completions at once on an H100 and
    keeps a CUDA graph for each of 51 batch sizes, also while it sleeps; for 64 it keeps 19."""
    return {
        "enable_sleep_mode": True,
        "gpu_memory_utilization": share,
        "enforce_eager": eager,
        "max_num_seqs": sequences or None,
        "kv_cache_dtype": kv_cache,
        "sleep_mode_offload_cudagraph": offload_graphs,
    }


def repack_tied_head(vllm_model):
    """On a CPU vLLM multiplies by a packed copy of the head; reload_weights renews it only for tensors it is
    given, and a tied head's is the embedding, so the copy would stay the old one."""
    head = vllm_model.lm_head
    head.weight = vllm_model.model.embed_tokens.weight
    head.quant_method.process_weights_after_loading(head)


def hold(output, values):
    """output (..., rows) of a projection, values (rows,), NaN where free -> the output, the rest held."""
    return torch.where(values.isnan(), output, values.to(output.dtype))


def clamp_hooks(clamp, model):
    """Clamp vLLM's model, whole on one rank -> the hooks' handles. Its fused projection is [q | k | v]."""
    handles = []
    for i, layer in enumerate(model.model.layers if clamp else []):
        attention = layer.self_attn
        q, k = (clamp[f"model.layers.{i}.self_attn.{which}_proj"] for which in "qk")
        values = torch.cat((q, k, torch.full((attention.kv_size,), torch.nan))).to(
            layer.input_layernorm.weight.device
        )
        hook = lambda module, args, output, values=values: (hold(output[0], values), output[1])  # noqa: E731
        handles.append(attention.qkv_proj.register_forward_hook(hook))
    return handles


@dataclass
class Completion:
    """ids: token ids with the stop token if there was one; logprobs: the sampler's, same length, nats, after
    temperature; finished: True when it stopped by itself, False when it was cut at max_tokens."""

    ids: list
    logprobs: list
    finished: bool


@dataclass
class Group:
    """One prompt and its completions; `index` is its place among all prompts drawn, which fixes its seed,
    `id` its row's.

    Accuracy and dynamic sampling go by `rewards`, advantages are made of `scores`. They are equal unless
    there are several reward functions, or --reward-weights.
    """

    index: int
    prompt: list  # P token ids
    completions: list  # G Completions
    rewards: torch.Tensor = None  # (G,) of the first reward function; 1.0 and more is right
    scores: torch.Tensor = None  # (G,) weighted sum of all K reward functions
    values: torch.Tensor = None  # (G, K) of each of them; NaN where it took too long, which counts as 0
    id: str | int = ""
    advantages: torch.Tensor = None  # (G,)
    entropies: torch.Tensor = None  # (G,) means over tokens, nats, by the trainer
    old_logprobs: list = None  # G times (R_i,), on the rank that trains it
    marked: list = None  # G times (R_i,) bool, by clip-cov or kl-cov

    def take_rewards(self, values, weights):
        """values (G, K), as above; weights (K,) of the reward functions."""
        known = values.nan_to_num(0.0)
        self.values, self.rewards, self.scores = values, known[:, 0], (known * weights).sum(1)

    @property
    def lengths(self):
        """R_i of each completion."""
        return [len(completion.ids) for completion in self.completions]

    @cached_property
    def known_lengths(self):
        """Of each completion, tokens whose log-probability by the sampler is finite; others are dropped."""
        return [sum(map(math.isfinite, completion.logprobs)) for completion in self.completions]

    def completion_ids(self, part, device):
        """Token ids of the completions `part` (indices) -> list of (R_i,) int64."""
        return [torch.tensor(self.completions[i].ids, device=device) for i in part]

    def sampler_logprobs(self, part, device):
        """The sampler's log-probabilities of the completions `part` -> those that are finite (n,), and their
        indices (n,) among the part's tokens."""
        logprobs = torch.cat([torch.tensor(self.completions[i].logprobs) for i in part])
        known = logprobs.isfinite().nonzero()[:, 0]
        return logprobs[known].to(device), known.to(device)

    @property
    def tokens(self):
        """What it costs to train on it: P + sum(R_i)."""
        return len(self.prompt) + sum(self.lengths)


class Rollout:
    """A vLLM engine over a checkpoint directory.

    context_length: most tokens of prompt + completion. dtype: "float32" or "bfloat16". tensor_parallel: ranks
    that share one engine. share: of the GPU's memory that vLLM may use in total (weights, KV cache; freed by
    `sleep`). rope_scaling: a YaRN dictionary instead of the one in the checkpoint's config.json. eager: no
    compiled graphs, which `clamp` needs. Only on a GPU: sequences, most completions that generate at once (0:
    vLLM's default); kv_cache "fp8" halves keys and values; offload_graphs: CUDA graphs sleep in the CPU's
    memory. Raises BadInput if vLLM cannot start.
    """

    def __init__(
        self,
        checkpoint,
        context_length,
        dtype,
        seed=0,
        tensor_parallel=1,
        share=0.5,
        rope_scaling=None,
        eager=False,
        sequences=0,
        kv_cache="auto",
        offload_graphs=False,
    ):
        config = Qwen3Config.from_pretrained(checkpoint)
        config = replace(config, rope_scaling=rope_scaling or config.rope_scaling)
        self.cuda, self.share = torch.cuda.is_available(), share
        self.clampable, self.clamped = tensor_parallel == 1 and (eager or not self.cuda), []
        rank = dist.get_rank() if dist.is_initialized() else 0
        if self.cuda:
            device_options = cuda_options(share, eager, sequences, kv_cache, offload_graphs)
        else:
            device_options = {
                "enforce_eager": True,
                "block_size": 32,  # small blocks share more of a short prompt
                # With chunked prefill seeded requests fail on CPUs: a generator has no offset there.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(8192, context_length),
                "kv_cache_memory_bytes": cache_bytes(config, context_length, dtype),
            }
        random_states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        try:
            self.engine = LLM(
                model=str(checkpoint),
                dtype=dtype,
                max_model_len=context_length,
                hf_overrides=rope_overrides(config),
                seed=seed + rank // tensor_parallel,  # equal within a tensor-parallel group
                tensor_parallel_size=tensor_parallel,
                distributed_executor_backend="external_launcher" if dist.is_initialized() else None,
                skip_tokenizer_init=True,
                use_tqdm_on_load=False,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",
                disable_log_stats=False,  # counters only, read by LLM.get_metrics()
                **device_options,
            )
        except (ValueError, RuntimeError, OSError) as error:  # of what vLLM raises, each is about its input
            raise BadInput(why_not_started(error, context_length, self.cuda)) from error
        random.setstate(random_states[0])  # an in-process engine reseeds the caller's generators
        numpy.random.set_state(random_states[1])
        torch.set_rng_state(random_states[2])

    def generate(self, prompts, n, temperature, max_tokens, seeds, stop_ids, progress=False):
        """prompts: lists of token ids; seeds: one int per prompt (sample j of a prompt uses seed + j);
        temperature 0 is greedy; progress: show a bar -> for each prompt a list of n Completions."""
        params = [
            SamplingParams(
                n=n,
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                max_tokens=max_tokens,
                seed=seed,
                stop_token_ids=stop_ids,
                logprobs=0,  # of the sampled token only
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = self.engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=progress and bars.bar
        )
        return [[self._completion(sample) for sample in output.outputs] for output in outputs]

    @staticmethod
    def _completion(sample):
        ids = list(sample.token_ids)
        logprobs = [step[token].logprob for step, token in zip(sample.logprobs, ids, strict=True)]
        return Completion(ids, logprobs, sample.finish_reason == "stop")

    def sync(self, model):
        """Give the engine `model`'s weights, with LoRA's update if it has one, one at a time (gathered from
        FSDP2 shards; every rank must call) and forget the KV cache of the old ones. Raises BadInput where the
        GPU has too little memory for both."""
        weights = lora.all_merged(model)
        what = "waking vLLM up beside the trainer's weights and moments"
        with memory.explain(what, f"--vllm-share ({self.share:g})"):
            if self.cuda:
                self.engine.wake_up(tags=["weights"])
            self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if self.cuda:
                self.engine.wake_up(tags=["kv_cache"])
        if model.config.tie_word_embeddings:
            self.engine.apply_model(repack_tied_head)
        self.engine.reset_prefix_cache()

    def clamp(self, values):
        """Hold dimensions of Q and K at values (a clamp of evals/clamp.py) from now on, instead of those
        before; {} lets go. Forgets the KV cache. RuntimeError for an engine that is not eager, where hooks do
        not run, or over several ranks."""
        if not self.clampable:
            raise RuntimeError(
                "a clamp needs an eager engine on one rank: Rollout(..., tensor_parallel=1, eager=True)"
            )
        for handle in self.clamped:
            handle.remove()
        [self.clamped] = self.engine.apply_model(partial(clamp_hooks, values))
        self.engine.reset_prefix_cache()

    def sleep(self):
        """Free the engine's GPU memory, weights and KV cache, until the next `sync`. Nothing on a CPU."""
        if self.cuda:
            self.engine.sleep(level=2)

    def close(self):
        """Shut the engine down, and with it the default process group, which vLLM destroys too."""
        self.engine.llm_engine.engine_core.shutdown()
