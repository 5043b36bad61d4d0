"""Data and models that some parts of the study need, made once in runs/study_data.

Pairs with other labels or fewer of them, reward models trained on these, policies of other sizes.
"""

import json
import random
import shutil
import sys
from pathlib import Path

from settings import FOLDER, PAIRS, POLICIES, REWARD_MODELS, SIZES

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tiny"))
import gold  # noqa: E402


def trainings():
    """{name: flags} of the runs that make the models."""
    found = {}
    for name, pairs in REWARD_MODELS.items():
        found[name] = {"script": "reward_model", "dataset": f"{FOLDER}/{pairs}", "seed": 1}
    as_tiny = {"dataset": "tiny", "data_epochs": 3, "learning_rate": 3e-3, "seed": 1}
    for name, init in POLICIES.items():
        found[name] = {"script": "sft", "model": f"{FOLDER}/{init}", **as_tiny}
    return found


def needed(runs):
    """Names in FOLDER that the flags of these runs have."""
    values = [str(value) for flags in runs for value in flags.values()]
    inside = [Path(value) for value in values if value.startswith(f"{FOLDER}/")]
    return {path.relative_to(FOLDER).parts[0] for path in inside}


def write_pairs(folder, count, by_gold, flipped):
    """train.jsonl with these labels; test.jsonl is tiny's."""
    lines = (ROOT / "tiny/data/train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:count]]
    if by_gold:
        for row in rows:
            pair = sorted(
                (row["chosen"], row["rejected"]),
                key=lambda response: -gold.gold_reward([row["prompt"]], [response])[0],
            )
            row["chosen"], row["rejected"] = pair
    for row in random.Random(1).sample(rows, count * flipped // 100):
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "tiny/data/test.jsonl", folder)


def write_init(folder, width, layers, heads):
    """A policy of this size with tiny's tokenizer and random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(
        ROOT / "tiny/init",
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tiny/init").save_pretrained(folder)


def prepare(runs):
    """Write the data that these runs need. Returns {folder: flags} of the trainings to wait for."""
    flags, names, root = trainings(), needed(runs), ROOT / FOLDER
    waiting = {}
    for name in flags:
        if name in names and not (root / name / "model").is_dir():
            waiting[root / name] = flags[name]
    for name in sorted(names | needed(waiting.values())):
        if name in flags or (root / name).is_dir():
            continue
        part = root / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if name in PAIRS:
            write_pairs(part, *PAIRS[name])
        else:
            write_init(part, *SIZES[name])
        part.rename(root / name)
    return waiting


def facts(model):
    """What is known of a model: its size, its training pairs, its last held-out evaluation."""
    from safetensors.numpy import load_file

    weights = load_file(ROOT / model / "model.safetensors")
    found = {"parameters": sum(weight.size for weight in weights.values())}
    run = Path(model).parent
    if run.name in REWARD_MODELS:
        found |= dict(zip(("pairs", "by_gold", "flipped"), PAIRS[REWARD_MODELS[run.name]]))
    file = ROOT / run / "evaluations.jsonl"
    if file.is_file():
        last = json.loads(file.read_text().splitlines()[-1])
        for key in ("rm/eval_accuracy", "sft/eval_loss"):
            if key in last:
                found[key] = float(f"{last[key]:.5g}")
    return found


def store_facts(runs, file):
    """Add what is known of the models of these runs to a file."""
    names = {str(flags[key]) for flags in runs for key in ("model", "reward_model") if key in flags}
    found = {name: facts(name) for name in sorted(names) if (ROOT / name).is_dir() and "/" in name}
    if found:
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, **found}, indent=1) + "\n")
