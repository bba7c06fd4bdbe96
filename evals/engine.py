"""vLLM over the ranks of an evaluation: items in, finished samples out, each written when it is done.

A script (eval_ruler.py) makes items and a function that scores them; an item is a dictionary
    id, task, length   which sample it is (id: unique text); task and length say where its score is averaged
    prompt_ids         token ids, or a function that gives them: called only on the rank whose turn it is, when it is;
                       where the seeds' prompts differ, {seed: token ids}
    max_tokens         most tokens of its completion
    expected           the right answer or answers, as JSON has them
and whatever its scorer needs.
"""

import hashlib
import itertools
import os
from collections import Counter

import torch
import torch.distributed as dist
from tqdm import tqdm

from base import processes
from base.cli import BadInput

# Qwen3's model card: greedy decoding makes its thinking repeat itself. RULER is greedy.
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
THINKING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0}
NON_THINKING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0}
PAPER = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}  # LongAct's: the whole distribution

# Requests in the engine at once: more than a GPU runs together, few enough that their prompts fit in memory.
# A CPU reads all prompts it is given before it answers the first, so there fewer means results sooner, at the
# same speed.
IN_FLIGHT = 512 if torch.cuda.is_available() else 32


class Engine:
    """vLLM over a checkpoint, one per `tensor_parallel` ranks. context_length: most tokens of prompt and
    completion; rope_scaling: YaRN instead of the checkpoint's own; share: of the GPU's memory; clamp: values
    that dimensions of Q and K are held at (clamp.py), None for a plain engine; in_flight: most requests at
    once. Raises BadInput if it cannot start."""

    def __init__(
        self,
        checkpoint,
        context_length,
        tensor_parallel=1,
        rope_scaling=None,
        share=0.9,
        clamp=None,
        in_flight=IN_FLIGHT,
    ):
        self.in_flight = in_flight
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        from rollout import Rollout  # importing vLLM takes seconds, and the user's input is checked before

        try:
            self.rollout = Rollout(
                *(checkpoint, context_length, dtype(), 0, tensor_parallel, share, rope_scaling),
                eager=clamp is not None,
            )
        except ValueError as error:
            raise BadInput(
                f"vLLM cannot start with {context_length} tokens: {str(error).splitlines()[0]}"
            ) from error
        if clamp is not None:
            self.rollout.clamp(clamp)
        rank, world = processes.rank_and_world()
        self.share, self.shares, self.leader = (
            rank // tensor_parallel,
            world // tensor_parallel,
            rank % tensor_parallel == 0,
        )

    def stream(self, requests):
        """requests: iterable of (key, prompt ids, keywords of SamplingParams) -> yields (key, token ids,
        whether it stopped by itself), each when it is done."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, requests, keys = self.rollout.engine.llm_engine, enumerate(requests), {}
        while True:
            for number, (key, prompt_ids, sampling) in itertools.islice(requests, self.in_flight - len(keys)):
                params = SamplingParams(
                    **sampling, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
                )
                engine.add_request(str(number), {"prompt_token_ids": prompt_ids}, params)
                keys[str(number)] = key
            if not keys:
                return
            for output in engine.step():
                if output.finished:
                    completion = output.outputs[0]
                    yield (
                        keys.pop(output.request_id),
                        list(completion.token_ids),
                        completion.finish_reason == "stop",
                    )

    def close(self):
        """Shut vLLM down, and with it the process group."""
        self.rollout.close()


def dtype():
    """Name of the dtype that an evaluation computes in."""
    return str(processes.compute_dtype()).removeprefix("torch.")


def evaluate(engine, results, items, total, seeds, sampling, stop_ids, tokenizer, score):
    """Every item of `items` (an iterable of `total`) once per seed, except what `results` has; each is
    written when done.

    score(item, prediction) -> float. A sample's random numbers depend on its id and seed only. Results are
    complete on rank 0 when it returns.
    """
    whole = Counter(item for item, _ in results.done)
    left = total - sum(n >= seeds for n in whole.values())
    mine = len(range(engine.share, left, engine.shares))
    bar = tqdm(
        total=mine * seeds,
        desc="evaluate",
        unit="sample",
        disable=processes.rank_and_world()[0] != 0,
        smoothing=0.05,
    )

    def requests():
        unfinished = (item for item in items if whole[item["id"]] < seeds)
        for item in itertools.islice(unfinished, engine.share, None, engine.shares):
            ids = item["prompt_ids"]() if callable(item["prompt_ids"]) else item["prompt_ids"]
            for seed in range(seeds):
                if (item["id"], seed) in results.done:
                    bar.update()
                    continue
                number = int.from_bytes(hashlib.sha256(f"{item['id']} {seed}".encode()).digest()[:7])
                limits = {"max_tokens": item["max_tokens"], "stop_token_ids": stop_ids, "seed": number}
                own = ids[seed] if isinstance(ids, dict) else ids
                yield (item, seed, len(own)), own, {**sampling, **limits}

    for (item, seed, prompt_tokens), ids, finished in engine.stream(requests()):
        prediction = tokenizer.decode(ids, skip_special_tokens=True)
        record = {
            **{key: item[key] for key in ("id", "task", "length")},
            "seed": seed,
            "expected": item["expected"],
            "prediction": prediction,
            "score": score(item, prediction),
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(ids),
            "finished": finished,
        }
        if engine.leader:  # ranks of one engine all have the same
            results.write(record)
        bar.update()
    bar.close()
    if processes.rank_and_world()[1] > 1:
        dist.barrier()
