"""How fast eval_longbench.py prepares prompts, without a model: index a synthetic file, then read, fill, cut
and encode.

    python bench/longbench_prompts.py --tokenizer CHECKPOINT/tokenizer.json    # keeps 0.3 GB in runs/

Documents have about --tokens tokens, with two questions each. A prompt of more than --max-input tokens is cut
and encoded again, so the defaults measure the slowest case. The file is made by studies/longbench_sample.py.
Peak memory is that of the whole process.
"""

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tokenizers import Tokenizer

from base.cli import one_line_errors, option, parse
from evals import longbench
from studies import longbench_sample


@dataclass
class Config:
    tokenizer: str = option("assets/tiny/tokenizer.json", "a tokenizer.json")
    items: int = option(500, "questions, two per document", least=2)
    tokens: int = option(125_000, "approximate number of tokens of a document", least=100)
    max_input: int = option(120_000, "tokens of a prompt, beyond which it is cut", least=2)
    workers: int = option(2, "threads", least=1)
    engines: int = option(1, "engines that share the prompts; those of the first are measured", least=1)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    path = Path(f"runs/longbench-bench-{config.items}-{config.tokens}.json")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        longbench_sample.write(path, config.items // 2, {"medium": config.tokens // 9})
    tokenizer = Tokenizer.from_file(config.tokenizer)
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB, {config.items} items; {config.workers} threads")
    print(f"peak memory with the tokenizer loaded: {peak():.0f} MiB")
    started = time.perf_counter()
    entries, _ = longbench.index(path)
    seconds = time.perf_counter() - started
    speed = path.stat().st_size / 1e6 / seconds
    print(f"index: {seconds:.1f} s, {speed:.0f} MB/s; peak memory {peak():.0f} MiB")

    encode = longbench.encoder(tokenizer, thinking=False)

    def prompt(entry):
        return encode(longbench.fill(longbench.ZERO_SHOT, longbench.read_item(path, entry)), config.max_input)

    mine = longbench.by_document(entries, config.engines)[:: config.engines]
    started, cpu, tokens, first = time.perf_counter(), time.process_time(), 0, None
    for ids in longbench.ahead(prompt, mine, config.workers, 16):
        tokens += len(ids)
        first = first or time.perf_counter() - started
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(
        f"prompts: {len(mine)} in {seconds:.1f} s, {cpu:.1f} s of CPU; "
        f"the first after {first:.1f} s, when 17 have been started"
    )
    print(
        f"{len(mine) / seconds:.2f} items/s, {tokens / seconds:,.0f} tokens/s of prompts; "
        f"peak memory {peak():.0f} MiB"
    )
