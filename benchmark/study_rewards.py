"""Rewards of the study: the embedded reward model's score plus a number that belongs to the prompt (translation)."""

import hashlib
import random
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

FOLDER = Path(__file__).resolve().parent.parent / "tiny" / "reward_model"
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER, dtype=torch.float32).eval()


@torch.no_grad()
def scores(prompts, responses):
    """The reward model's scores; every response is taken to have ended, as nearly all do here."""
    found = []
    for i in range(0, len(prompts), 64):
        texts = zip(prompts[i : i + 64], responses[i : i + 64])
        rows = [
            tokenizer(x).input_ids + tokenizer(y).input_ids + [tokenizer.eos_token_id]
            for x, y in texts
        ]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows])
        hidden = model.base_model(ids).last_hidden_state[
            torch.arange(len(rows)), torch.tensor([*map(len, rows)]) - 1
        ]
        found += model.score(hidden).squeeze(-1).tolist()
    return found


def shifted(prompts, responses, deviation):
    """δ(x) ~ N(0, deviation²), always the same for the same prompt."""
    seeds = (int.from_bytes(hashlib.sha256(x.encode()).digest()[:8], "big") for x in prompts)
    return [
        r + deviation * random.Random(seed).gauss(0, 1)
        for seed, r in zip(seeds, scores(prompts, responses))
    ]


def shift_0(prompts, responses):
    return shifted(prompts, responses, 0)


def shift_1(prompts, responses):
    return shifted(prompts, responses, 1)


def shift_10(prompts, responses):
    return shifted(prompts, responses, 10)
