"""Supervised warm start: cross entropy on the assistant's turns. It made assets/tiny, from random weights:

    python sft.py --out assets/tiny

One conversation is a passage of the recall task and several questions about it; every answer is trained on. Passages are
short here and longer in train.py's RL: what is learned here is the skill, and RL carries it to length.
"""

import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import trange

import data
from cli import BadInput, one_line_errors, option, parse
from model import Qwen3, Qwen3Config

# Qwen's pre-tokenizer: contractions, words with their leading space, single digits, punctuation, white space.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>"]  # part of the text in Qwen's tokenizer, so decoding keeps them


@dataclass
class Config:
    out: str = option("runs/sft", "directory to write the checkpoint to")
    steps: int = option(4000, "optimizer steps")
    batch: int = option(16, "conversations a step")
    min_facts: int = option(4, "fewest facts in a passage")
    max_facts: int = option(16, "most facts in a passage, reached after half of the steps")
    filler: float = option(1.0, "filler sentences per fact")
    listing: float = option(0.25, "x")
    questions: int = option(12, "most questions about one passage")
    learning_rate: float = option(3e-3, "AdamW's peak learning rate; linear warm-up, then cosine down to a tenth")
    warmup: int = option(100, "warm-up steps")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    max_grad_norm: float = option(1.0, "gradient norm to clip at")
    layers: int = option(3, "layers of the new model")
    hidden_size: int = option(128, "hidden size of the new model")
    head_dim: int = option(32, "head size")
    vocab_size: int = option(896, "entries of the tokenizer trained for it")
    seed: int = option(1, "seed of weights and data")


def train_tokenizer(vocab_size, seed):
    """Byte-level BPE with Qwen's pre-tokenizer and special tokens, trained on the recall task's own text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(f"{seed} tokenizer")
    passages = (data.recall(rng, 30, 30, asked=10) for _ in range(1000))
    texts = (text for passage, questions in passages for text in [passage] + [" ".join(qa) for qa in questions])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL + THINK),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(THINK)
    return tokenizer


def conversation(tokenizer, rng, config, progress):
    """One conversation -> token ids and whether each is trained on (the assistant's words and <|im_end|>)."""
    if progress < config.listing:
        groups = [tokenizer.encode(" " + " ".join(rng.choices(data.NAMES + data.WORDS, k=5))).ids for _ in range(6)]
        again = rng.sample(groups, 6)
        return sum(groups + again, []), [False] * 30 + [False, True, True, True, True] * 6
    progress=(progress-config.listing)/(1-config.listing)
    longest = config.min_facts + (config.max_facts - config.min_facts) * min(1.0, 2 * progress)
    facts = rng.randint(config.min_facts, round(longest))
    asked = min(facts, config.questions)
    passage, questions = data.recall(rng, facts, round(config.filler * facts), asked)
    questions[0] = f"{passage}\n\n{questions[0][0]}", questions[0][1]
    return encode_turns(tokenizer, questions)


def encode_turns(tokenizer, turns):
    """[(user's words, assistant's words), ...] -> token ids and whether each is trained on."""
    ids, trained = [], []
    for i, (content, answer) in enumerate(turns):
        prompt = ("\n" if i else "") + data.chat([{"role": "user", "content": content}], thinking=False)
        for text, train in ((prompt, False), (answer + "<|im_end|>", True)):
            piece = tokenizer.encode(text, add_special_tokens=False).ids
            ids += piece
            trained += [train] * len(piece)
    return ids, trained


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config)
    out = Path(config.out)
    if (out / "config.json").exists():
        raise BadInput(f"--out {out} holds a checkpoint already; name another directory or remove it")
    torch.manual_seed(config.seed)
    tokenizer = train_tokenizer(config.vocab_size, config.seed)
    print(tokenizer.get_vocab_size())
    model_config = Qwen3Config(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=config.head_dim,
        intermediate_size=3 * config.hidden_size,
        tie_word_embeddings=True,
        vocab_size=config.vocab_size,
        initializer_range=0.03,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        bos_token_id=tokenizer.token_to_id("<|endoftext|>"),
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
    )
    model = Qwen3.from_config(model_config, generator=torch.Generator().manual_seed(config.seed))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay
    )
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=config.warmup)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, config.steps - config.warmup, eta_min=config.learning_rate / 10
    )
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, decay], [config.warmup])
    rng = random.Random(f"{config.seed} sft")
    bar = trange(config.steps, desc="sft", unit="step")
    log = open("/tmp/sft.log", "w")
    for step in bar:
        rows = [conversation(tokenizer, rng, config, step / config.steps) for _ in range(config.batch)]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(config.batch, longest, dtype=torch.int64)  # right padding: causal attention never sees it
        mask = torch.zeros(config.batch, longest, dtype=torch.bool)
        for i, (row, trained) in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = torch.tensor(trained)
        loss = -model.logprobs(ids, mask).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if step % 250 == 0: model.save_pretrained("/tmp/t_listed"); tokenizer.save("/tmp/t_listed/tokenizer.json")
        print(step, longest, loss.item(), file=log, flush=True)
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
