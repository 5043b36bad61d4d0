"""Make the embedded world from nothing: data, tokenizer, untrained configuration, SFT policy and reward model.

    python tiny/make.py            everything, and how good it is; see --help

The two models are made by the project's own sft.py and reward_model.py, with the settings below. The same seed gives
the same bytes of data on any machine; the weights are the same on the same machine with the same versions.
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

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
SFT = ["--data-epochs", "3", "--eval-every", "1000"]
REWARD_MODEL = ["--data-epochs", "3", "--weight-decay", "0.1", "--eval-every", "250"]


@dataclass
class Args:
    seed: int = 0  # of the data and of both trainings
    check_only: bool = False  # measure what is there instead of making it


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
    config.save_pretrained(HERE / "init")
    tokenizer.save_pretrained(HERE / "init")


def write_demonstrations(folder):
    """All three answers of every row as demonstrations: each is a sample of the grammar, labels do not matter here."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = [json.loads(line) for line in open(HERE / "data" / f"{split}.jsonl")]
        answers = [
            (row["prompt"], row[key])
            for key in ("completion", "chosen", "rejected")
            for row in rows
        ]
        lines = [
            json.dumps({"prompt": prompt, "completion": answer}) + "\n"
            for prompt, answer in answers
        ]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return str(folder)


def train(script, seed, options):
    """Run a script as a user would and keep the model that it saves as tiny/SCRIPT."""
    run = HERE.parent / "runs" / "tiny_make" / script
    command = [
        sys.executable,
        HERE.parent / f"{script}.py",
        "--output-dir",
        run,
        "--overwrite",
        "--seed",
        seed,
        *options,
    ]
    subprocess.run([str(part) for part in command], check=True)
    shutil.rmtree(HERE / script, ignore_errors=True)
    shutil.copytree(run / "model", HERE / script)


def choices(texts, prompts):
    """Shares of polite and rude openings and of on-topic steps among the texts that parse, and the share that does."""
    parsed = [
        (grammar.parse(text), grammar.read_prompt(prompt)[0])
        for text, prompt in zip(texts, prompts)
    ]
    answers = [(answer, topic) for answer, topic in parsed if answer]
    steps = [step_topic == topic for answer, topic in answers for step_topic, _ in answer.steps]
    shares = {
        kind: sum(answer.opening == kind for answer, _ in answers) / len(answers)
        for kind in ("polite", "rude")
    }
    return {"parse": len(answers) / len(texts), **shares, "on topic": sum(steps) / len(steps)}


def check(seed):
    """Print what the world promises: docs/results.md has the figures to expect."""
    import p3o_v2  # for its sampler

    tokenizer = AutoTokenizer.from_pretrained(HERE / "sft")
    policy = AutoModelForCausalLM.from_pretrained(HERE / "sft", dtype=torch.float32)
    test = [json.loads(line) for line in open(HERE / "data" / "test.jsonl")]
    prompts = random.Random(seed).choices(
        list(dict.fromkeys(row["prompt"] for row in test)), k=10_000
    )
    ids = [torch.tensor(tokenizer(prompt).input_ids) for prompt in prompts]
    noise = torch.rand(
        len(ids), 1, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    texts = []
    for i in range(0, len(ids), 1000):
        part = ids[i : i + 1000], noise[i : i + 1000]
        with torch.no_grad():
            samples = p3o_v2.sample_responses(policy, *part, 1.0, [tokenizer.eos_token_id])
        texts += tokenizer.batch_decode([y for [y], _ in samples], skip_special_tokens=True)
    rng = random.Random(seed)
    print("SFT policy, 10,000 samples: ", choices(texts, prompts))
    print("its first 1,000 samples:    ", choices(texts[:1000], prompts[:1000]))
    print(
        "grammar, 10,000 samples:    ",
        choices([grammar.sample_response(prompt, rng) for prompt in prompts], prompts),
    )
    rewards = torch.tensor(gold.gold_reward(prompts, texts))
    groups = [rewards[[i for i, p in enumerate(prompts) if p == prompt]] for prompt in set(prompts)]
    within = torch.cat([group - group.mean() for group in groups]).square().sum() / (
        len(prompts) - len(groups)
    )
    means = torch.tensor([group.mean() for group in groups])
    print(
        f"gold reward of SFT samples: mean {rewards.mean():.2f}, standard deviation within a prompt {within.sqrt():.2f}"
    )
    print(f"    and between the means of prompts {means.std():.2f}")
    better = gold.gold_reward([row["prompt"] for row in test], [row["chosen"] for row in test])
    worse = gold.gold_reward([row["prompt"] for row in test], [row["rejected"] for row in test])
    wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(better, worse)) / len(test)
    print(f"gold reward's accuracy on the {len(test):,} held-out noisy pairs: {wins:.1%}")
    reward_model = AutoModelForSequenceClassification.from_pretrained(
        HERE / "reward_model", dtype=torch.float32
    )
    score = partial(
        p3o_v2.in_batches, partial(p3o_v2.response_scores, reward_model), batch_size=256
    )
    x = [torch.tensor(tokenizer(row["prompt"]).input_ids) for row in test]
    pairs = [
        [torch.tensor([*tokenizer(row[key]).input_ids, 0]) for key in ("chosen", "rejected")]
        for row in test
    ]
    with torch.no_grad():
        scores = score(x, pairs)
    margins = scores[:, 0] - scores[:, 1]
    print(f"reward model's accuracy on them: {(margins.sign() / 2 + 0.5).mean():.1%}")
    kept = (path for path in HERE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    size = sum(path.stat().st_size for path in kept)
    print(f"size of tiny/: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    start = time.time()
    if not args.check_only:
        make_init(data.write_tokenizer(HERE / "init", data.write_data(HERE / "data", args.seed)))
        demonstrations = write_demonstrations(HERE.parent / "runs" / "tiny_make" / "demonstrations")
        train("sft", args.seed, [*SFT, "--dataset", demonstrations])
        train("reward_model", args.seed, REWARD_MODEL)
        print(f"made in {time.time() - start:.0f} seconds\n")
    check(args.seed)
