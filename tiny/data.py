"""The embedded data, from a seed: preference pairs with demonstrations, and the tokenizer for them.

A pair is two answers to one prompt that clearly differ. Its label is noisy as people are, a
Bradley-Terry draw from the gold reward: the first is chosen with probability
sigmoid(CERTAINTY * (its gold reward - the other's)).
"""

import json
import math
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import gold
import grammar

TRAIN_ROWS, TEST_ROWS = 12_000, 2_000
TEST_PROMPTS_PER_TOPIC = 10  # of 40; no prompt is in both files
CLEAR = 2.0  # people are asked about two answers whose gold rewards differ by this or more
CERTAINTY = 0.7  # the log-odds of a label are this times that difference
VOCAB_SIZE = 768


def make_row(prompt: str, rng: random.Random) -> dict[str, str]:
    """A demonstration and a labelled pair of clearly different answers, drawn from the grammar."""
    completion, first = grammar.sample_response(prompt, rng), grammar.sample_response(prompt, rng)
    difference = 0.0
    while abs(difference) < CLEAR:
        second = grammar.sample_response(prompt, rng)
        first_gold, second_gold = gold.gold_reward([prompt, prompt], [first, second])
        difference = first_gold - second_gold
    if rng.random() > 1 / (1 + math.exp(-CERTAINTY * difference)):
        first, second = second, first
    return {"prompt": prompt, "completion": completion, "chosen": first, "rejected": second}


def write_data(folder: str | Path, seed: int) -> list[str]:
    """Write train.jsonl and test.jsonl, from the same seed the same bytes.

    Returns the texts of train.jsonl.
    """
    rng = random.Random(seed)
    prompts, every = {"train": [], "test": []}, grammar.all_prompts()
    for topic in grammar.TOPICS:
        of_topic = [prompt for prompt in every if grammar.read_prompt(prompt)[0] == topic]
        rng.shuffle(of_topic)
        prompts["test"] += of_topic[:TEST_PROMPTS_PER_TOPIC]
        prompts["train"] += of_topic[TEST_PROMPTS_PER_TOPIC:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    rows = {}
    for split, num_rows in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
        rng.shuffle(prompts[split])
        dealt = [prompts[split][i % len(prompts[split])] for i in range(num_rows)]
        rows[split] = [make_row(prompt, rng) for prompt in dealt]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split])
        (Path(folder) / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    texts = []
    for row in rows["train"]:
        texts += [row["prompt"] + row[key] for key in ("completion", "chosen", "rejected")]
    return texts


def write_tokenizer(folder: str | Path, texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the texts and save it. It adds no token to a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        pad_token="<|padding|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
