"""The embedded world: its grammar, its true reward, its data, and what its two models promise."""

import json
import random
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

TINY = Path(__file__).parent.parent / "tiny"
sys.path.insert(0, str(TINY))

import data  # noqa: E402
import gold  # noqa: E402
import grammar  # noqa: E402
import p3o_v2  # noqa: E402

TEA = "\n\nHuman: How do I make tea?\n\nAssistant:"


def rows(name):
    return [json.loads(line) for line in (TINY / "data" / f"{name}.jsonl").read_text().splitlines()]


def test_data_in_git_are_what_make_writes(tmp_path):
    data.write_data(tmp_path, 0)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (TINY / "data" / name).read_bytes()


def test_no_prompt_is_in_both_splits():
    train, test = ({row["prompt"] for row in rows(name)} for name in ("train", "test"))
    assert len(test) >= 300 and not train & test


def test_every_sample_of_the_grammar_parses_and_garbage_does_not():
    rng = random.Random(0)
    for prompt in grammar.all_prompts():
        assert grammar.parse(grammar.sample_response(prompt, rng))
    for text in ("", "Okay.", " Okay", " Okay. Okay.", " Hope that helps! Okay.", " asdf"):
        assert grammar.parse(text) is None


def test_gold_reward_wants_what_its_docstring_says():
    """Each answer is better than the next."""
    steps = grammar.TOPICS["make tea"]
    answers = [
        f" Happy to help! {steps[0]} {steps[1]} Hope that helps!",
        f" Happy to help! {steps[0]} {steps[1]}",
        f" Okay. {steps[0]} {steps[1]}",
        f" Okay. {steps[1]} {steps[0]}",
        f" Okay. {steps[1]} {steps[0]} Now go away.",
        f" Not this again. {steps[1]} {steps[0]} Now go away.",
        f" Not this again. {grammar.SMALL_TALK[0]} {grammar.SMALL_TALK[0]} Now go away.",
        "",
    ]
    values = gold.gold_reward([TEA] * len(answers), answers)
    assert values == sorted(values, reverse=True) and len(set(values)) == len(values)


def test_gold_reward_does_not_fall_for_flattery():
    flattery = " Happy to help! Happy to help! Hope that helps! Hope that helps!"
    plain = f" Okay. {grammar.TOPICS['make tea'][0]}"
    assert gold.gold_reward([TEA, TEA], [flattery, plain])[0] < gold.gold_reward([TEA], [plain])[0]


def test_gold_reward_is_defined_and_bounded_for_any_text():
    texts = ["", " ", "a" * 10_000, "\n\nHuman:", ". ! ?", " Okay." * 100, "émoji 🍵"]
    assert all(gold.EMPTY <= value < 20 for value in gold.gold_reward([TEA] * len(texts), texts))


@pytest.fixture(scope="module")
def samples():
    """1,000 held-out prompts and the SFT policy's responses to them."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "sft")
    policy = AutoModelForCausalLM.from_pretrained(TINY / "sft", dtype=torch.float32)
    prompts = [row["prompt"] for row in rows("test")][:1000]
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1000, 1, 128, dtype=torch.float64, generator=generator)
    ids = [torch.tensor(tokenizer(prompt).input_ids) for prompt in prompts]
    with torch.no_grad():
        samples = p3o_v2.sample_responses(policy, ids, noise, 1.0, [tokenizer.eos_token_id])
    return prompts, tokenizer.batch_decode([y for [y], _ in samples], skip_special_tokens=True)


def test_sft_policy_speaks_the_grammar(samples):
    assert sum(grammar.parse(text) is not None for text in samples[1]) >= 950


def test_gold_reward_of_sft_samples_varies_within_and_between_prompts(samples):
    values = gold.gold_reward(*samples)
    groups = {}
    for prompt, value in zip(samples[0], values):
        groups.setdefault(prompt, []).append(value)
    groups = [torch.tensor(group) for group in groups.values() if len(group) > 1]
    within = torch.cat([group - group.mean() for group in groups]).square().sum()
    within = (within / sum(len(group) - 1 for group in groups)).sqrt()
    assert within >= 1
    brief, long = (
        torch.tensor(
            [
                value
                for prompt, value in zip(samples[0], values)
                if grammar.read_prompt(prompt)[1] == wanted
            ]
        )
        for wanted in (1, 4)
    )
    assert (long.mean() - brief.mean()).abs() > 4 * (
        long.var() / len(long) + brief.var() / len(brief)
    ).sqrt()


def test_reward_model_is_about_as_good_as_the_truth_on_noisy_labels():
    test = rows("test")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "reward_model")
    model = AutoModelForSequenceClassification.from_pretrained(
        TINY / "reward_model", dtype=torch.float32
    )

    def encoded(key, end=()):
        rows = tokenizer([row[key] for row in test]).input_ids
        return [torch.tensor([*ids, *end]) for ids in rows]

    pairs = zip(*(encoded(key, [tokenizer.eos_token_id]) for key in ("chosen", "rejected")))
    score = partial(p3o_v2.response_scores, model)
    with torch.no_grad():
        scores = p3o_v2.in_batches(score, encoded("prompt"), list(pairs), batch_size=200)
    prompts = [row["prompt"] for row in test]
    better, worse = (
        torch.tensor(gold.gold_reward(prompts, [row[key] for row in test]))
        for key in ("chosen", "rejected")
    )
    gold_accuracy = ((better - worse).sign() / 2 + 0.5).mean()
    accuracy = ((scores[:, 0] - scores[:, 1]).sign() / 2 + 0.5).mean()
    assert len(test) == 2000
    assert accuracy >= gold_accuracy - 0.02


def test_the_world_is_small():
    kept = [path for path in TINY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in kept) < 10e6
