"""What the tests share: short runs of every script, tiny random models."""

import hashlib
import os
import sys
import tempfile

import pytest
import torch
from filelock import FileLock
from scripts import ROOT, TINY, lines, run, write_splits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import AutoModelForSequenceClassification as AutoClassifier

sys.path.insert(0, str(ROOT))
CACHE = tempfile.TemporaryDirectory()
os.environ["HF_DATASETS_CACHE"] = CACHE.name  # nothing of the tests stays in the user's
torch.set_num_threads(1)  # on models as small as these, threads only wait for each other

# ------------------------------------------------------------------- short runs of every script
ONLINE = ("p3o_v2", "p3o_v1", "rloo", "grpo", "ppo", "online_dpo")
OFFLINE = ("dpo", "ipo", "mpo")
SCORED = (*ONLINE, *OFFLINE)  # they start at the SFT policy, and evaluate by rewards
EVERY = (*SCORED, "sft", "reward_model")
EVALUATIONS = {script: "frontier" if script in SCORED else "evaluations" for script in EVERY}
SHORT_ONLINE = "--prompts-per-update 4 --minibatch-size 2 --num-epochs 2 --num-responses 2"
SHORT_ONLINE += " --max-response-tokens 8 --learning-rate 2e-4 --eval-prompts 4"
SHORT = "--minibatch-size 4 --max-response-tokens 16 --learning-rate 1e-3 --eval-prompts 4"
SHORT = {script: (SHORT_ONLINE if script in ONLINE else SHORT).split() for script in EVERY}
THREE = "--num-updates 3 --save-every 1 --eval-every 2 --output-dir run".split()


def tiny_rows(name, n):
    """The first n rows of the embedded world with different prompts."""
    rows = {}
    for row in lines(TINY / f"data/{name}.jsonl"):
        rows.setdefault(row["prompt"], row)
    return list(rows.values())[:n]


def events_of(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def ending(folder):
    """What must not depend on how often a run was interrupted: weights, and logs without times."""
    weights = (folder / "model/model.safetensors").read_bytes()
    found = {"weights": hashlib.sha256(weights).hexdigest()}
    for file in folder.glob("*.jsonl"):
        found[file.name] = [{**row, "time/update": 0} for row in lines(file)]
    events = events_of(folder)
    for tag in events.Tags()["scalars"]:
        if not tag.startswith("time/"):
            found[tag] = sorted((event.step, event.value) for event in events.Scalars(tag))
    return found


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all workers of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def data(shared):
    """A folder with a train and a test split of a few rows, an odd number to learn from."""
    folder = shared / "world/data"
    with FileLock(shared / "world.lock"):
        if not folder.exists():
            write_splits(folder, tiny_rows("train", 21), tiny_rows("test", 6))
    return folder


@pytest.fixture(scope="session")
def flags(data):
    """{script: the flags of a short run in the folder run}"""
    return {script: [*SHORT[script], *THREE, "--dataset", data] for script in EVERY}


@pytest.fixture(scope="session")
def finished(flags, shared):
    """finished(script): the folder of a run that nothing disturbed, the same for all workers."""

    def finished(script):
        folder = shared / "finished" / script
        with FileLock(shared / f"{script}.lock"):
            if not (folder / "run/model").is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                run(script, *flags[script], "--overwrite", cwd=folder)
        return folder / "run"

    return finished


# ------------------------------------------------------------------------------------ tiny models
V = 100  # vocabulary
COMMON = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
COMMON |= {"vocab_size": V, "num_labels": 1}
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SHAPES = {  # what is special; gpt2 has learned positions, and its head is its embedding
    "llama": {"num_key_value_heads": 2},  # grouped-query attention
    "qwen2": {"num_key_value_heads": 2},  # biases in its attention
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},  # shorter than most rows
}
KINDS = {"policy": AutoModelForCausalLM, "score": AutoClassifier}


def build(shape, kind, seed, **changes):
    """In float32, with weights of deviation 0.4, so that its next token is far from uniform."""
    options = COMMON | SIZES | {"max_position_embeddings": 64} | SHAPES.get(shape, {}) | changes
    torch.manual_seed(seed)
    model = KINDS[kind].from_config(AutoConfig.for_model(shape, **options)).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1 or name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.4)
    return model


def save(model, folder, tokenizer=None):
    """Save a model with the tokenizer of the embedded world, or another."""
    model.save_pretrained(folder)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(TINY / "sft")
    tokenizer.save_pretrained(folder)
