"""How assets/tiny was made, from random weights and without data (5 minutes on 2 CPU cores).

    python -m studies.tiny --out runs/tiny

In the first stage a small network learns to look things up. It reads groups of tokens and then the same
groups in another order, and is trained on the tokens that follow the first of a group, until it copies them.
(Attention heads that do this are called induction heads.) In the second stage it sees conversations, a
passage of the recall task and questions about it, and is trained on every answer. Passages are short here and
longer in train.py: the skill is learned here, and RL extends it to longer passages.
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from base import bars
from base.cli import BadInput, one_line_errors, option, parse
from core import schedule
from model import Qwen3, Qwen3Config
from prompts import chat, tasks, template
from run.resume import lock_run

# Qwen's pre-tokenizer: contractions, words with their leading space, single digits, punctuation, white space.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>"]  # tokens of their own, but part of the text when decoded, as in Qwen3
BYTES = 256 + len(SPECIAL + THINK)  # tokens of a tokenizer that knows no word


@dataclass
class Config:
    out: str = option("runs/tiny", "directory of the run; the model is in its checkpoint/")
    seed: int = option(1, "seed of weights and data", least=0, most=2**31 - 1)
    batch: int = option(32, "groups of tokens a step, and half as many chats", least=2, most=10**5)
    copy_until: float = option(0.5, "first stage: ends when a step's loss is below this, nats", above=0)
    steps: int = option(1200, "second stage: steps over which the learning rate's cosine falls", least=1)
    stop: int = option(401, "second stage: stop early, with plenty left to learn (0: do not)", least=0)
    learning_rate: float = option(3e-3, "AdamW's peak learning rate", above=0, most=1)
    warmup: int = option(50, "steps of linear warm-up of each stage", least=1)
    min_facts: int = option(2, "fewest facts in a passage; as many filler sentences stand between them")
    max_facts: int = option(16, "most facts in a passage, reached after half of the second stage")
    questions: int = option(12, "most questions about one passage", least=1)
    layers: int = option(3, "layers of the new model", least=1, most=64)
    hidden_size: int = option(128, "its hidden size", least=1, most=1024)
    heads: int = option(8, "its query heads; two key heads", least=2, most=64)
    head_dim: int = option(32, "its head size", least=2, most=256)
    vocab_size: int = option(
        896, "rows of its embedding; the tokenizer has no more tokens", least=BYTES, most=2**18
    )


def train_tokenizer(vocab_size, seed):
    """-> a Tokenizer: byte-level BPE with Qwen's pre-tokenizer and special tokens, trained on texts of the
    recall task. It has `vocab_size` tokens, or fewer if every word is a token before."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(f"{seed} tokenizer")
    texts = []
    for _ in range(1000):
        passage, questions = tasks.recall(rng, 30, 30, asked=10)
        texts += [passage, *map(" ".join, questions)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL + THINK),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(THINK)
    return tokenizer


def save_tokenizer(tokenizer, out, context):
    """Write to the directory `out` tokenizer.json, and the three files that transformers and vLLM need to use
    it as Qwen3's. context: tokens that the model reads."""
    end, stop = (tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    generation_config = {
        "bos_token_id": end,
        "eos_token_id": [stop, end],
        "pad_token_id": end,
        "do_sample": True,
    }
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(template.CHATML)


def token_groups(rng, vocabulary, size=5, count=6):
    """Random groups of tokens, then twice the same groups in other orders -> ids, and which of them are
    trained on (list of bool): in the repeats, all but a group's first.

    Tokens are drawn from the whole vocabulary. Rows of the tied embedding that never occurred would be pushed
    out of the softmax along a direction common to all others, which makes it much harder to match tokens by
    content.
    """
    groups = [rng.choices(range(vocabulary), k=size) for _ in range(count)]
    again = rng.sample(groups, count) + rng.sample(groups, count)
    ids = list(itertools.chain(*groups, *again))
    return ids, [False] * size * count + ([False] + [True] * (size - 1)) * 2 * count


def conversation(tokenizer, rng, config, progress):
    """A passage and questions about it -> ids, and which of them are trained on (list of bool). progress, 0
    to 1, sets how long passages may be."""
    longest = config.min_facts + (config.max_facts - config.min_facts) * min(1.0, 2 * progress)
    facts = rng.randint(config.min_facts, round(longest))
    passage, questions = tasks.recall(rng, facts, facts, asked=min(facts, config.questions))
    messages = []
    for i, (question, answer) in enumerate(questions):
        content = question if i else f"{passage}\n\n{question}"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return chat.encode_conversation(tokenizer, messages)


def pad(rows):
    """[(ids, trained), ...] -> ids (B, T) int64, mask (B, T) bool, padded on the right, where causal
    attention never sees it."""
    ids, mask = ([torch.tensor(row[k]) for row in rows] for k in (0, 1))
    return tuple(torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (ids, mask))


def check(config):
    """Raises BadInput for sizes of the Config that do not fit together."""
    if not 1 <= config.min_facts <= config.max_facts <= len(tasks.NAMES):
        raise BadInput(f"--min-facts and --max-facts must be ordered and in 1 to {len(tasks.NAMES)}")
    if config.heads % 2 or config.head_dim % 2:
        raise BadInput("--heads and --head-dim must be even")


def make(config, out):
    """Train a new model in both stages; write out/metrics.jsonl (step, stage, loss, grad_norm, learning_rate)
    and out/checkpoint."""
    tokenizer = train_tokenizer(config.vocab_size, config.seed)
    model_config = Qwen3Config(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=2,
        head_dim=config.head_dim,
        intermediate_size=3 * config.hidden_size,
        tie_word_embeddings=True,
        vocab_size=config.vocab_size,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        initializer_range=0.03,
        bos_token_id=tokenizer.token_to_id("<|endoftext|>"),
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
    )
    model = Qwen3.from_config(model_config, generator=torch.Generator().manual_seed(config.seed))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0)
    rng = random.Random(f"{config.seed} sft")
    metrics_file, total = open(out / "metrics.jsonl", "w"), itertools.count(1)

    for stage in ("copy", "recall"):
        bar = bars.bar(desc=stage, unit="step", total=config.steps if stage == "recall" else None)
        for step in itertools.count():
            if stage == "recall" and (step == config.steps or step == config.stop > 0):
                break
            recalling = stage == "recall"
            rate = config.learning_rate * schedule.warmup_factor(step + 1, config.warmup)
            rate *= schedule.cosine_factor(step, config.steps) if recalling else 1
            optimizer.param_groups[0]["lr"] = rate
            # The second stage copies, too: the model would unlearn it before it has a use for it.
            copied = [token_groups(rng, tokenizer.get_vocab_size()) for _ in range(config.batch)]
            loss = -model.logprobs(*pad(copied)).mean()
            loss.backward()
            if recalling:
                progress = step / config.steps
                asked = [conversation(tokenizer, rng, config, progress) for _ in range(config.batch // 2)]
                loss = -model.logprobs(*pad(asked)).mean()
                loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            metrics = {
                "step": next(total),
                "stage": stage,
                "loss": loss.item(),
                "grad_norm": norm.item(),
                "learning_rate": rate,
            }
            print(json.dumps(metrics), file=metrics_file, flush=True)
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
            bar.update()
            if stage == "copy" and loss.item() < config.copy_until:
                break
        bar.close()
    metrics_file.close()
    model.save_pretrained(out / "checkpoint")
    save_tokenizer(tokenizer, out / "checkpoint", model_config.max_position_embeddings)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}/checkpoint: {parameters:,} parameters, last loss {loss.item():.3f}")


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    check(config)
    lock = lock_run(Path(config.out), "", "studies.tiny", "--out")
    make(config, Path(config.out))
