"""How fast evals/ruler makes samples, and how full the windows are: a table, on one core.

    OMP_NUM_THREADS=1 python bench/ruler_samples.py --tokenizer CHECKPOINT/tokenizer.json --samples 20

The time is that of the process, without what it loads once: essays, words, the tokenizer.
"""

import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core
sys.path.insert(0, str(Path(__file__).parent.parent))

from tokenizers import Tokenizer

from base.cli import one_line_errors, option, parse
from evals.ruler import sets as ruler
from evals.ruler import texts


@dataclass
class Config:
    tokenizer: str = option("assets/tiny/tokenizer.json", "a tokenizer.json")
    data_dir: str = option("", "directory with RULER's data files; empty: the generated essay, no qa")
    lengths: str = option("4096,32768,131072", "window lengths in tokens")
    samples: int = option(20, "samples per task and length; they share the time of the sizing probes")
    slow: bool = option(False, "count whole texts at every step, as RULER does")


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    if config.slow:
        ruler.additive = lambda tokenizer: False
    tokenizer, corpora = Tokenizer.from_file(config.tokenizer), ruler.Corpora(config.data_dir or None)
    lengths = [int(length) for length in config.lengths.split(",")]
    blocked = corpora.blocked(ruler.TASKS.values(), lengths)
    corpora.sentences(1)  # essays and words are loaded once per process, not once per task
    texts.keys()
    print(f"{config.samples} samples, tokenizer {config.tokenizer}, essays: {corpora.essay_source}")
    print(f"{'task':16}" + "".join(f"{length:>9} tokens/s, filled least mean" for length in lengths))
    template = ruler.TEMPLATES["qwen3"]
    speeds = {length: [] for length in lengths}
    for name in [name for name in ruler.TASKS if name not in blocked]:
        print(f"{name:16}", end="", flush=True)
        for length in lengths:
            started = time.process_time()
            rows = ruler.generate(name, length, config.samples, 42, tokenizer, template, corpora)
            tokens = [row["length"] for row in rows]
            speed = sum(tokens) / (time.process_time() - started)
            speeds[length].append(speed)
            filled = f"{min(tokens) / length:.3f} {statistics.mean(tokens) / length:.3f}"
            print(f"{speed:>18,.0f}{filled:>21}", end="", flush=True)
        print()
    means = [statistics.harmonic_mean(speeds[length]) for length in lengths]
    print(f"{'harmonic mean':16}" + "".join(f"{mean:>18,.0f}{'':21}" for mean in means))
