"""What some parts of the study need besides the embedded world: pairs with other labels or fewer of them, reward
models trained on these, policies of other sizes. All lies below runs/study_data; benchmark/study.py makes it, once.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import torch
from safetensors.numpy import load_file
from study_figures import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(ROOT / "tiny"))
import gold  # noqa: E402

FOLDER = "runs/study_data"  # relative: settings of runs that name it are stored
PAIRS = {  # how many of tiny's training pairs, the first; whether the gold reward labels them; per cent flipped
    "gold_flipped_0": (1600, True, 0),
    "gold_flipped_30": (1600, True, 30),
    "pairs_1200": (1200, False, 0),
    "pairs_3600": (3600, False, 0),
    "pairs_12000": (12000, False, 0),
    "pairs_12000_flipped_30": (12000, False, 30),
}
SIZES = {
    "init_100k": (48, 2, 2),
    "init_1200k": (144, 4, 6),
}  # hidden size, layers, heads; tiny: 96, 4, 4
REWARD_MODELS = {f"reward_{name}": name for name in PAIRS if name.startswith("pairs")}
POLICIES = {name.replace("init", "policy"): name for name in SIZES}


def trainings():
    """The flags of the runs that make the models: defaults on tiny, which sft.py does not take for a folder's model."""
    found = {
        x: {"script": "reward_model", "dataset": f"{FOLDER}/{y}", "seed": 1}
        for x, y in REWARD_MODELS.items()
    }
    as_tiny = {"dataset": "tiny", "data_epochs": 3, "learning_rate": 3e-3, "seed": 1}
    return found | {
        x: {"script": "sft", "model": f"{FOLDER}/{y}", **as_tiny} for x, y in POLICIES.items()
    }


def needed(runs):
    """Names in FOLDER that the flags of these runs have."""
    values = (str(value) for flags in runs for value in flags.values())
    return {
        Path(value).relative_to(FOLDER).parts[0]
        for value in values
        if value.startswith(f"{FOLDER}/")
    }


def write_pairs(folder, count, by_gold, flipped):
    """train.jsonl with these labels; test.jsonl is tiny's."""
    rows = [json.loads(line) for line in open(ROOT / "tiny/data/train.jsonl", encoding="utf-8")][
        :count
    ]
    for row in rows if by_gold else ():
        row["chosen"], row["rejected"] = sorted(
            (row["chosen"], row["rejected"]),
            key=lambda y, x=row["prompt"]: -gold.gold_reward([x], [y])[0],
        )
    for row in random.Random(1).sample(rows, count * flipped // 100):
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    shutil.copy(ROOT / "tiny/data/test.jsonl", folder)


def write_init(folder, hidden, layers, heads):
    """A policy of this size with tiny's tokenizer and random weights."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ROOT / "tiny/init", intermediate_size=4 * hidden, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tiny/init").save_pretrained(folder)


def prepare(runs):
    """Writes the data that these runs need; returns {folder: flags} of the trainings that they wait for."""
    flags, names, root = trainings(), needed(runs), ROOT / FOLDER
    waiting = {
        root / x: flags[x] for x in flags if x in names and not (root / x / "model").is_dir()
    }
    for name in sorted(names | needed(waiting.values())):
        if name not in flags and not (root / name).is_dir():
            part = root / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            write_pairs(part, *PAIRS[name]) if name in PAIRS else write_init(part, *SIZES[name])
            part.rename(root / name)
    return waiting


def facts(model):
    """What is known of a model: its size, the pairs it learned from, its last evaluation on held-out data."""
    sizes = {
        "parameters": sum(x.size for x in load_file(ROOT / model / "model.safetensors").values())
    }
    run, file = Path(model).parent.name, ROOT / Path(model).parent / "evaluations.jsonl"
    if run in REWARD_MODELS:
        sizes |= dict(zip(("pairs", "by_gold", "flipped"), PAIRS[REWARD_MODELS[run]]))
    last = json.loads(file.read_text().splitlines()[-1]) if file.is_file() else {}
    return sizes | {key: last[key] for key in ("rm/eval_accuracy", "sft/eval_loss") if key in last}
