"""Supervised warm start: cross entropy on the assistant's turns. It made assets/tiny, from random weights, with

    python sft.py --out runs/tiny          # about 5 minutes on 2 CPU cores

First a small network has to learn to look things up at all: it reads groups of tokens and then the same groups in another
order, and is trained on the tokens that follow a group's first, until it copies them (attention heads that do this are
called induction heads). Then it sees conversations: a passage of the recall task and questions about it, trained on every
answer. Passages are short here and longer in train.py: what is learned here is the skill, RL carries it to length.
"""

import itertools
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

import data
import tasks
from cli import BadInput, one_line_errors, option, parse
from model import Qwen3, Qwen3Config

# Qwen's pre-tokenizer: contractions, words with their leading space, single digits, punctuation, white space.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>"]  # tokens of their own, but part of the text when decoded, as in Qwen3
# data.chat as a template, for transformers and vLLM.
CHAT_TEMPLATE = r"""{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""


@dataclass
class Config:
    out: str = option("runs/sft", "directory to write the checkpoint to")
    copy_until: float = option(0.5, "first stage: copy groups of tokens until a step's loss is below this, nats")
    steps: int = option(1200, "second stage: steps that its schedules of length and learning rate are made for")
    stop: int = option(401, "second stage: stop after so many steps, while RL has plenty left to teach (0: do not)")
    batch: int = option(32, "groups of tokens a step; conversations, which are longer, half as many")
    min_facts: int = option(2, "fewest facts in a passage; as many filler sentences stand between them")
    max_facts: int = option(16, "most facts in a passage, reached after half of the second stage")
    questions: int = option(12, "most questions about one passage")
    learning_rate: float = option(3e-3, "AdamW's peak learning rate; cosine down to a tenth in the second stage")
    warmup: int = option(50, "steps of linear warm-up, in each stage")
    layers: int = option(3, "layers of the new model")
    hidden_size: int = option(128, "its hidden size")
    heads: int = option(8, "its query heads; two key heads")
    head_dim: int = option(32, "its head size")
    vocab_size: int = option(896, "rows of its embedding; the tokenizer stops at this or when every word is a token")
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
    passages = (tasks.recall(rng, 30, 30, asked=10) for _ in range(1000))
    texts = (text for passage, questions in passages for text in [passage] + [" ".join(qa) for qa in questions])
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
    """tokenizer.json and the three files that make transformers and vLLM use it as Qwen3's."""
    end, stop = (tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    generation_config = {"bos_token_id": end, "eos_token_id": [stop, end], "pad_token_id": end, "do_sample": True}
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def token_groups(rng, vocabulary, size=5, count=6):
    """Random groups of tokens, then twice the same groups in other orders -> ids, and which tokens are trained on: all
    but a group's first. Tokens are drawn from the whole vocabulary: rows of the tied embedding that never occur would be
    pushed out of the softmax by a direction common to all others, and matching tokens by content gets much harder."""
    groups = [rng.choices(range(vocabulary), k=size) for _ in range(count)]
    again = rng.sample(groups, count) + rng.sample(groups, count)
    ids = list(itertools.chain(*groups, *again))
    return ids, [False] * size * count + ([False] + [True] * (size - 1)) * 2 * count


def conversation(tokenizer, rng, config, progress):
    """A passage and questions about it as ChatML -> ids, and which tokens are trained on: the assistant's words and
    <|im_end|>. `progress` (0 to 1) sets how long passages may be."""
    longest = config.min_facts + (config.max_facts - config.min_facts) * min(1.0, 2 * progress)
    facts = rng.randint(config.min_facts, round(longest))
    passage, questions = tasks.recall(rng, facts, facts, asked=min(facts, config.questions))
    ids, trained = [], []
    for i, (question, answer) in enumerate(questions):
        content = question if i else f"{passage}\n\n{question}"
        prompt = ("\n" if i else "") + data.chat([{"role": "user", "content": content}], thinking=False)
        for text, train in ((prompt, False), (answer + "<|im_end|>", True)):
            piece = tokenizer.encode(text, add_special_tokens=False).ids
            ids += piece
            trained += [train] * len(piece)
    return ids, trained


def pad(rows):
    """[(ids, trained), ...] -> ids (B, T) int64, mask (B, T) bool. Padding on the right: causal attention never sees it."""
    ids, mask = ([torch.tensor(row[k]) for row in rows] for k in (0, 1))
    return tuple(torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (ids, mask))


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    if not 1 <= config.min_facts <= config.max_facts <= len(tasks.NAMES):
        raise BadInput(f"--min-facts and --max-facts must be ordered and in 1 to {len(tasks.NAMES)}")
    if min(config.steps, config.batch // 2, config.questions, config.warmup) < 1 or config.heads % 2:
        raise BadInput("--steps, --questions and --warmup must be positive, --batch at least 2, --heads even")
    out = Path(config.out)
    if out.exists():
        raise BadInput(f"--out {out} exists already; name another directory or remove it")
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
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    rng = random.Random(f"{config.seed} sft")

    for stage in ("copy", "recall"):
        bar = tqdm(desc=stage, unit="step", total=config.steps if stage == "recall" else None)
        for step in itertools.count():
            progress = step / config.steps if stage == "recall" else 0.0
            if stage == "recall" and (step == config.steps or step == config.stop > 0):
                break
            decay = 0.55 + 0.45 * math.cos(math.pi * progress)  # cosine from 1 to 0.1
            optimizer.param_groups[0]["lr"] = config.learning_rate * decay * min(1.0, (step + 1) / config.warmup)
            # Copying goes on in the second stage, which would unlearn it before it finds a use for it.
            copied = [token_groups(rng, tokenizer.get_vocab_size()) for _ in range(config.batch)]
            loss = -model.logprobs(*pad(copied)).mean()
            loss.backward()
            if stage == "recall":
                asked = [conversation(tokenizer, rng, config, progress) for _ in range(config.batch // 2)]
                loss = -model.logprobs(*pad(asked)).mean()
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
            if stage == "copy" and loss.item() < config.copy_until:
                break
        bar.close()
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out, model_config.max_position_embeddings)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, last loss {loss.item():.3f}")
