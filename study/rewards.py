"""Reward function of the part `translation`: the built-in reward model plus δ(x) ~ N(0, 10²)."""

import hashlib
import random
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

FOLDER = Path(__file__).resolve().parent.parent / "tiny/reward_model"
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER, dtype=torch.float32).eval()


@torch.no_grad()
def scores(prompts, responses):
    """Scores of the reward model, for responses that have all ended."""
    found = []
    for prompt, response in zip(prompts, responses):
        ids = tokenizer(prompt).input_ids + tokenizer(response).input_ids
        logits = model(torch.tensor([ids + [tokenizer.eos_token_id]])).logits
        found.append(logits.item())
    return found


def shift_10(prompts, responses):
    """The scores plus δ(x), always the same for the same prompt."""
    shifted = []
    for prompt, score in zip(prompts, scores(prompts, responses)):
        digest = hashlib.sha256(prompt.encode()).digest()
        seed = int.from_bytes(digest[:8], "big")
        shifted.append(score + random.Random(seed).gauss(0, 10))
    return shifted
