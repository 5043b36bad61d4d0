"""Make the built-in world from nothing: data, tokenizer, configuration, SFT policy, reward model.

    python tiny/make.py                  everything, and then measure how good it is
    python tiny/make.py --check-only     measure what is there

The two models are made by the project's own sft.py and reward_model.py, with the settings below.
The same seed gives the same bytes of data on any machine. The weights are the same on the same
machine with the same versions.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
import tyro
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXConfig,
)

import data
import gold
import grammar

TINY = Path(__file__).resolve().parent
ROOT = TINY.parent
RUNS = ROOT / "runs/tiny_make"
SFT = ["--data-epochs", "3", "--eval-every", "1000"]
REWARD_MODEL = ["--data-epochs", "3", "--weight-decay", "0.1", "--eval-every", "250"]


@dataclass
class Args:
    seed: int = 0  # of the data and of both trainings
    check_only: bool = False  # measure what is there instead of making it


def read_rows(split):
    """The rows of the train or test split."""
    return [json.loads(line) for line in open(TINY / "data" / f"{split}.jsonl")]


def make_init(tokenizer):
    """The configuration of the policy, 0.5 M parameters, without weights."""
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.architectures = ["GPTNeoXForCausalLM"]
    config.save_pretrained(TINY / "init")
    tokenizer.save_pretrained(TINY / "init")


def write_demonstrations(folder):
    """All three answers of every row as demonstrations: each is a sample of the grammar."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows, lines = read_rows(split), []
        for key in ("completion", "chosen", "rejected"):
            for row in rows:
                pair = {"prompt": row["prompt"], "completion": row[key]}
                lines.append(json.dumps(pair) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))


def train(script, seed, options):
    """Run a script as a user would and keep the model that it saves as tiny/SCRIPT."""
    run = RUNS / script
    command = [sys.executable, ROOT / f"{script}.py", "--output-dir", run, "--overwrite"]
    command += ["--seed", str(seed), *options]
    subprocess.run(command, check=True)
    shutil.rmtree(TINY / script, ignore_errors=True)
    shutil.copytree(run / "model", TINY / script)


def choices(texts, prompts):
    """Of texts the share that parses, and of those the shares of openings and of steps on topic."""
    openings, on_topic = [], []
    for text, prompt in zip(texts, prompts):
        answer, topic = grammar.parse(text), grammar.read_prompt(prompt)[0]
        if answer:
            openings.append(answer.opening)
            on_topic += [step_topic == topic for step_topic, _ in answer.steps]
    return {
        "parse": len(openings) / len(texts),
        "polite": openings.count("polite") / len(openings),
        "rude": openings.count("rude") / len(openings),
        "on topic": sum(on_topic) / len(on_topic),
    }


def sample_texts(prompts, seed):
    """A response of the SFT policy to each prompt."""
    import p3o_v2

    tokenizer = AutoTokenizer.from_pretrained(TINY / "sft")
    policy = AutoModelForCausalLM.from_pretrained(TINY / "sft", dtype=torch.float32)
    ids = [torch.tensor(row) for row in tokenizer(prompts).input_ids]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(ids), 1, 128, dtype=torch.float64, generator=generator)
    end_ids = [tokenizer.eos_token_id]
    sampler = partial(p3o_v2.sample_responses, policy, temperature=1.0, end_ids=end_ids)
    with torch.no_grad():
        samples = p3o_v2.in_batches(sampler, ids, noise, batch_size=1000)
    return tokenizer.batch_decode([y for [y], _ in samples], skip_special_tokens=True)


def reward_model_accuracy(rows):
    """The share of labelled pairs in which the reward model prefers the chosen response."""
    import p3o_v2

    folder = TINY / "reward_model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts, pairs = [], []
    for row in rows:
        prompt, *pair = tokenizer([row["prompt"], row["chosen"], row["rejected"]]).input_ids
        prompts.append(torch.tensor(prompt))
        pairs.append([torch.tensor([*ids, tokenizer.eos_token_id]) for ids in pair])
    score = partial(p3o_v2.response_scores, model)
    with torch.no_grad():
        scores = p3o_v2.in_batches(score, prompts, pairs, batch_size=256)
    return (0.5 - scores.diff().sign() / 2).mean().item()  # a tie counts as half


def check(seed):
    """Print what the world promises: docs/results.md has the figures to expect."""
    rows, rng = read_rows("test"), random.Random(seed)
    held_out = list(dict.fromkeys(row["prompt"] for row in rows))
    prompts = rng.choices(held_out, k=10_000)
    texts = sample_texts(prompts, seed)
    rng = random.Random(seed)
    written = [grammar.sample_response(prompt, rng) for prompt in prompts]
    print("SFT policy, 10,000 samples: ", choices(texts, prompts))
    print("its first 1,000 samples:    ", choices(texts[:1000], prompts[:1000]))
    print("grammar, 10,000 samples:    ", choices(written, prompts))

    rewards = torch.tensor(gold.gold_reward(prompts, texts))
    of_prompt = {prompt: [] for prompt in prompts}
    for prompt, reward in zip(prompts, rewards):
        of_prompt[prompt].append(reward)
    groups = [torch.stack(group) for group in of_prompt.values()]
    means = torch.stack([group.mean() for group in groups])
    within = sum((group - group.mean()).square().sum() for group in groups)
    within = (within / (len(prompts) - len(groups))).sqrt()
    print(f"gold reward of SFT samples: mean {rewards.mean():.2f}, standard deviation within a")
    print(f"    prompt {within:.2f}, between the means of prompts {means.std():.2f}")

    test_prompts = [row["prompt"] for row in rows]
    better = gold.gold_reward(test_prompts, [row["chosen"] for row in rows])
    worse = gold.gold_reward(test_prompts, [row["rejected"] for row in rows])
    wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(better, worse)) / len(rows)
    print(f"gold reward's accuracy on the {len(rows):,} held-out noisy pairs: {wins:.1%}")
    print(f"reward model's accuracy on them: {reward_model_accuracy(rows):.1%}")
    kept = (path for path in TINY.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    print(f"size of tiny/: {sum(path.stat().st_size for path in kept) / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # for p3o_v2
    transformers.logging.disable_progress_bar()
    args = tyro.cli(Args, description=__doc__)
    start = time.time()
    if not args.check_only:
        make_init(data.write_tokenizer(TINY / "init", data.write_data(TINY / "data", args.seed)))
        write_demonstrations(RUNS / "demonstrations")
        train("sft", args.seed, [*SFT, "--dataset", str(RUNS / "demonstrations")])
        train("reward_model", args.seed, REWARD_MODEL)
        print(f"made in {time.time() - start:.0f} seconds\n")
    check(args.seed)
