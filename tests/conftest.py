"""What the tests share: scripts as processes that start at once, short runs of all of them, tiny
random models."""

import atexit
import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tiny"
sys.path.insert(0, str(ROOT))
CACHE = tempfile.TemporaryDirectory()
os.environ["HF_DATASETS_CACHE"] = CACHE.name  # nothing of the tests stays in the user's

# --------------------------------------------------------------------------- scripts as processes
# A process that has imported the libraries and forks one child for every script to run: the
# imports, several seconds, are paid once. It starts no thread, which a fork would lose.
NURSERY = """
import json, os, runpy, signal, sys, traceback
import accelerate, datasets, matplotlib.pyplot, torch, transformers, tyro
import torch.distributed.fsdp, torch.utils.tensorboard, transformers.cache_utils
from transformers import AutoTokenizer, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
get_checkpoint_conversion_mapping("gpt_neox")  # takes a while when first asked for
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    job = json.loads(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child:  # stays to tell the child's number and exit code
        for name in ("pid", "code"):
            value = child if name == "pid" else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            with open(f"{job['output']}.{name}.part", "w") as file:
                file.write(str(value))
            os.rename(f"{job['output']}.{name}.part", f"{job['output']}.{name}")
        os._exit(0)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # what it prints stands before what it says later
    sys.argv, code = job["argv"], 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
"""


class Nursery:
    """A process to fork others from, with a change of the environment."""

    def __init__(self, **environment):
        # One thread each: on models as small as these, threads only wait for each other.
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            text=True,
            env={**os.environ, **quiet, **environment},
        )
        self.folder = tempfile.TemporaryDirectory()
        atexit.register(self.process.kill)

    def start(self, **job):
        job["output"] = f"{self.folder.name}/{time.monotonic_ns()}"
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Path(job["output"])


class Script:
    """A script as a process of its own.

    Script("p3o_v1", "--beta", 0.1, cwd=folder).wait() -> (exit code, output)
    """

    nursery = None

    def __init__(self, script, *args, cwd, nursery=None, **env):
        if not nursery:
            nursery = Script.nursery = Script.nursery or Nursery()
        path = script if str(script).endswith(".py") else ROOT / f"{script}.py"
        self.output = nursery.start(argv=[str(path), *map(str, args)], cwd=str(cwd), env=env)

    def _read(self, name, seconds):
        file, end = Path(f"{self.output}.{name}"), time.monotonic() + seconds
        while not file.exists():
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)
        return int(file.read_text())

    @property
    def pid(self):
        return self._read("pid", 60)

    def said(self):
        return self.output.read_text() if self.output.exists() else ""

    def wait(self, seconds=300):
        return self._read("code", seconds), self.said()


def run(script, *args, cwd, code=0, **options):
    """Run a script to its end and return what it printed.

    It must end with this exit code and without a traceback.
    """
    found, output = Script(script, *args, cwd=cwd, **options).wait()
    assert found == code, output
    assert "Traceback" not in output
    return output


# ------------------------------------------------------------------- short runs of every script
ONLINE = ("p3o_v2", "p3o_v1", "rloo", "grpo", "ppo", "online_dpo")
OFFLINE = ("dpo", "ipo", "mpo")
STAGES = ("sft", "reward_model")
EVERY = (*ONLINE, *OFFLINE, *STAGES)
LOSS = dict.fromkeys(EVERY, "policy/loss") | {"sft": "sft/loss", "reward_model": "rm/loss"}
EVALUATIONS = {script: "evaluations" if script in STAGES else "frontier" for script in EVERY}
SHORT_ONLINE = "--prompts-per-update 4 --minibatch-size 2 --num-epochs 2 --num-responses 2"
SHORT_ONLINE += " --max-response-tokens 8 --learning-rate 2e-4 --eval-prompts 4"
SHORT = "--minibatch-size 4 --max-response-tokens 16 --learning-rate 1e-3 --eval-prompts 4"
SHORT = {script: (SHORT_ONLINE if script in ONLINE else SHORT).split() for script in EVERY}
THREE = "--num-updates 3 --save-every 1 --eval-every 2 --output-dir run".split()


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny_rows(name, n):
    """The first n rows of the embedded world with different prompts."""
    rows = {}
    with open(TINY / f"data/{name}.jsonl") as file:
        for line in file:
            row = json.loads(line)
            rows.setdefault(row["prompt"], row)
            if len(rows) == n:
                return list(rows.values())


def no_constant(name):
    raise AssertionError(f"{name} is no number of JSON")


def lines(file):
    return [json.loads(line, parse_constant=no_constant) for line in file.read_text().splitlines()]


def without_times(rows):
    return [{key: row[key] for key in row if not key.startswith("time/")} for row in rows]


def contents(folder):
    """{path: (bytes, time of the last change)} of all files in a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def events_of(folder):
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def ending(folder):
    """What must not depend on how often a run was interrupted: weights, and logs without times."""
    weights = (folder / "model/model.safetensors").read_bytes()
    found = {"weights": hashlib.sha256(weights).hexdigest()}
    for file in folder.glob("*.jsonl"):
        found[file.name] = without_times(lines(file))
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
            write_rows(folder / "train.jsonl", tiny_rows("train", 21))
            write_rows(folder / "test.jsonl", tiny_rows("test", 6))
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
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                run(script, *flags[script], cwd=folder)
        return folder / "run"

    return finished


# Runs a script, and in it a line of Python just before a change of the file system.
DISTURB = """
import os, resource, runpy, signal, sys

line, event, text, *sys.argv = sys.argv[1:]

def watch(name, values):
    if name == event and text in str(values[0]):
        exec(line)

sys.addaudithook(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture(scope="session")
def disturb(tmp_path_factory):
    """A file with the arguments LINE EVENT TEXT SCRIPT FLAGS: what to run and where to disturb."""
    file = tmp_path_factory.mktemp("disturb") / "disturb.py"
    file.write_text(DISTURB)
    return file


# ------------------------------------------------------------------------------------ tiny models
V = 100  # vocabulary
COMMON = {
    "vocab_size": V,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "num_labels": 1,
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LONGEST = {"max_position_embeddings": 64}
NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "classifier_dropout": 0.0}
WINDOW = 8  # of mistral: shorter than most rows of the tests
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
SHAPES = {
    "gpt_neox": (
        GPTNeoXConfig(**COMMON, **SIZES, **LONGEST, **NO_DROPOUT),
        {"policy": GPTNeoXForCausalLM, "score": GPTNeoXForSequenceClassification},
    ),
    "llama": (  # with grouped-query attention
        LlamaConfig(**COMMON, **SIZES, **LONGEST, num_key_value_heads=2, attention_dropout=0.0),
        {"policy": LlamaForCausalLM, "score": LlamaForSequenceClassification},
    ),
    "gpt2": (  # learned positions, embeddings tied to the output
        GPT2Config(**COMMON, **GPT2, attn_pdrop=0.0, summary_first_dropout=0.0),
        {"policy": GPT2LMHeadModel, "score": GPT2ForSequenceClassification},
    ),
    "qwen2": (  # with biases in its attention
        Qwen2Config(**COMMON, **SIZES, **LONGEST, num_key_value_heads=2, attention_dropout=0.0),
        {"policy": Qwen2ForCausalLM, "score": Qwen2ForSequenceClassification},
    ),
    "mistral": (  # with a sliding window
        MistralConfig(**COMMON, **SIZES, **LONGEST, num_key_value_heads=2, sliding_window=WINDOW),
        {"policy": MistralForCausalLM, "score": MistralForSequenceClassification},
    ),
}


def build(shape, kind, seed, **changes):
    """In float32, with weights of deviation 0.4, so that its next token is far from uniform."""
    config, classes = SHAPES[shape]
    config = copy.deepcopy(config)
    config.update(changes)
    torch.manual_seed(seed)
    model = classes[kind](config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1 or name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.4)
    return model


def save(model, folder, tokenizer=None):
    """Save a model with the tokenizer of the embedded world, or another."""
    model.save_pretrained(folder)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(TINY / "sft")
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def one_thread():
    """On models as small as these, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
