"""vLLM over the ranks of an evaluation: items in, finished samples out, each written when it is done.

A script (eval_ruler.py) makes items and a function that scores them. An item is a dictionary:
    id, task, length   which sample it is (id: unique text); task and length say where its score is averaged
    prompt_ids         token ids, or a function that returns them, called only on the rank that needs them
                       and only when it does; where the prompts differ between seeds, {seed: token ids}
    max_tokens         maximum number of tokens of its completion
    expected           the right answer or answers, as JSON values
and whatever its scorer needs. The scorer returns {"answer": what it read in the completion, as a JSON value,
None if nothing, "score": a float in [0, 1], ...}; its keys become keys of the sample's line in results.jsonl.
"""

import hashlib
import itertools
import os
from collections import Counter

import torch
import torch.distributed as dist

from base import bars, processes
from prompts import chat

# Qwen3's model card: greedy decoding makes its thinking repeat itself. RULER is greedy.
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
THINKING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
NON_THINKING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}
PAPER = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}  # LongAct's: the whole distribution

# Requests in the engine at once: more than a GPU runs together, few enough that their prompts fit in memory.
# A CPU reads all the prompts it is given before it answers the first, so fewer requests give results sooner,
# at the same speed.
IN_FLIGHT = 512 if torch.cuda.is_available() else 32


class Engine:
    """vLLM over a checkpoint, one engine per `tensor_parallel` ranks.

    context_length: maximum number of tokens of prompt and completion. rope_scaling: YaRN instead of the
    checkpoint's own. memory_share: of the GPU's memory. clamp: values that dimensions of Q and K are held at
    (evals/clamp.py), None for a plain engine. in_flight: maximum number of requests at once. Raises BadInput
    if vLLM cannot start.

    number, engines: which engine this rank belongs to, of how many. leader: whether this rank is the engine's
    first.
    """

    def __init__(
        self,
        checkpoint,
        context_length,
        tensor_parallel=1,
        rope_scaling=None,
        memory_share=0.9,
        clamp=None,
        in_flight=IN_FLIGHT,
    ):
        self.in_flight = in_flight
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        from rollout import Rollout  # importing vLLM takes seconds, and the user's input is checked before

        options = (dtype(), 0, tensor_parallel, memory_share, rope_scaling)
        self.rollout = Rollout(checkpoint, context_length, *options, eager=clamp is not None)
        if clamp is not None:
            self.rollout.clamp(clamp)
        rank, world = processes.rank_and_world()
        self.number, self.engines = rank // tensor_parallel, world // tensor_parallel
        self.leader = rank % tensor_parallel == 0

    def stream(self, requests, ended=None):
        """requests: iterable of (key, prompt ids, keywords of SamplingParams) -> yields (key, token ids,
        whether the completion ended by itself), each when it is done. ended(token ids so far): whether a
        completion is to end there; vLLM gets no tokenizer, so it cannot look for a text itself."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, requests, keys = self.rollout.engine.llm_engine, enumerate(requests), {}
        kind = RequestOutputKind.CUMULATIVE if ended else RequestOutputKind.FINAL_ONLY
        how = {"detokenize": False, "output_kind": kind}
        while True:
            for number, (key, prompt_ids, sampling) in itertools.islice(requests, self.in_flight - len(keys)):
                params = SamplingParams(**sampling, **how)
                engine.add_request(str(number), {"prompt_token_ids": prompt_ids}, params)
                keys[str(number)] = key
            if not keys:
                return
            for output in engine.step():
                completion, number = output.outputs[0], output.request_id
                ids, stopped = list(completion.token_ids), completion.finish_reason == "stop"
                if ended and not output.finished and ended(ids):
                    engine.abort_request([number])
                    stopped = True
                if output.finished or stopped:
                    yield keys.pop(number), ids, stopped

    def close(self):
        """Shut vLLM down, and with it the process group."""
        self.rollout.close()


def dtype():
    """The name of the dtype that an evaluation computes in."""
    return str(processes.compute_dtype()).removeprefix("torch.")


def sampling_text(sampling):
    """The parameters of a sampling, for a report."""
    return ", ".join(f"{key} {value:g}" for key, value in sampling.items())


def complete(options, model_config, clamp, context, results, items, sampling, tokenizer, score, stop=""):
    """What `results` lacks, by an engine of its own; nothing if it lacks nothing. options: the script's
    subject.Options; context: maximum number of tokens of prompt and completion; the others as for Engine and
    `evaluate`."""
    if len(results.done) == len(results.expected):
        return
    rope = model_config.rope_scaling
    engine = Engine(options.checkpoint, context, options.tensor_parallel, rope, options.vllm_share, clamp)
    evaluate(engine, results, items, options, sampling, tokenizer, score, stop)
    engine.close()


def evaluate(engine, results, items, options, sampling, tokenizer, score, stop=""):
    """Complete and score every item of the iterable `items` once per seed of options.seeds, except what
    `results` has; each sample is written when it is done. stop: a text that ends a completion.

    score(item, prediction) -> dict, see above. A sample's random numbers depend on its id and seed only. When
    this returns, the results are complete on rank 0."""
    seeds, stop_ids = options.seeds, chat.stop_ids(tokenizer)
    seeds_done = Counter(item for item, _ in results.done)
    rank, world = processes.rank_and_world()
    # Of all engines: the others are about as far as this one.
    bar = bars.bar(
        total=len(results.expected),
        initial=len(results.done),
        **{"desc": "evaluate", "unit": "sample", "disable": rank != 0, "smoothing": 0.05},
    )

    def requests():
        left = (item for item in items if seeds_done[item["id"]] < seeds)
        for item in itertools.islice(left, engine.number, None, engine.engines):
            ids = item["prompt_ids"]() if callable(item["prompt_ids"]) else item["prompt_ids"]
            for seed in range(seeds):
                if (item["id"], seed) in results.done:
                    continue
                vllm_seed = int.from_bytes(hashlib.sha256(f"{item['id']} {seed}".encode()).digest()[:7])
                limits = {"max_tokens": item["max_tokens"], "stop_token_ids": stop_ids, "seed": vllm_seed}
                prompt_ids = ids[seed] if isinstance(ids, dict) else ids
                yield (item, seed, prompt_ids), prompt_ids, {**sampling, **limits}

    def ended(ids):  # each character of `stop` takes a token at most
        return stop in tokenizer.decode(ids[-len(stop) :])

    for (item, seed, prompt_ids), ids, finished in engine.stream(requests(), ended if stop else None):
        prediction = tokenizer.decode(ids, skip_special_tokens=True)
        record = {
            **{key: item[key] for key in ("id", "task", "length")},
            "seed": seed,
            "expected": item["expected"],
            "prediction": prediction,
            **score(item, prediction),
            "prompt_tokens": len(prompt_ids),
            "completion_tokens": len(ids),
            "finished": finished,
        }
        if options.log_prompts:
            record["prompt"] = tokenizer.decode(prompt_ids, skip_special_tokens=False)
        if engine.leader:  # all ranks of an engine have the same completions
            results.write(record)
        bar.update(min(engine.engines, bar.total - bar.n))
    bar.close()
    if world > 1:
        dist.barrier()
