"""What the tests share: the scripts on the path, scripts as processes that start at once, and tiny random models."""

import atexit
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from transformers import (
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
sys.path.insert(0, str(ROOT))

# A process that has imported the libraries and forks one child for every script to run: the imports, several seconds,
# are paid once. It runs nothing itself, so that no thread is lost in a fork.
NURSERY = """
import json, os, runpy, signal, sys, traceback
import accelerate, datasets, matplotlib.pyplot, torch, transformers, tyro
import torch.distributed.fsdp, torch.utils.tensorboard, transformers.cache_utils
from transformers import AutoTokenizer, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification
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
    sys.stdout.reconfigure(line_buffering=True)  # what it prints stands before what it says on stderr later
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


class Script:
    """A script as a process of its own: Script("p3o_v1", "--beta", 0.1, cwd=folder).wait() -> (exit code, output)."""

    nursery = None

    def __init__(self, script, *args, cwd, **env):
        if Script.nursery is None:
            # Threads that wait do not spin: on a busy machine twice as fast.
            quiet = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
            Script.nursery = subprocess.Popen(
                [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, text=True, env=quiet
            )
            Script.folder = tempfile.TemporaryDirectory()
            atexit.register(Script.nursery.kill)
        path = script if str(script).endswith(".py") else ROOT / f"{script}.py"
        self.output = Path(Script.folder.name) / str(time.monotonic_ns())
        job = {
            "argv": [str(path), *map(str, args)],
            "cwd": str(cwd),
            "env": env,
            "output": str(self.output),
        }
        Script.nursery.stdin.write(json.dumps(job) + "\n")
        Script.nursery.stdin.flush()

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


def run(script, *args, cwd, code=0, **env):
    """Run a script to its end and return what it printed; it must end with this exit code and without a traceback."""
    found, output = Script(script, *args, cwd=cwd, **env).wait()
    assert found == code, output
    assert "Traceback" not in output
    return output


def sampled(model, prompts, noise, temperature, end_ids):
    """The first plan's sample_responses with noise [B, K, T]: its responses, and their log-probabilities as one tensor padded with 0."""
    from p3o_v1 import sample_responses

    responses, logprobs, _ = zip(
        *sample_responses(model, prompts, noise.flatten(0, 1), temperature, end_ids)
    )
    return list(responses), torch.nn.utils.rnn.pad_sequence(logprobs, batch_first=True)


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
    """A model in float32 with weights of standard deviation 0.4, so that its next token is far from uniform."""
    config, classes = SHAPES[shape]
    config = copy.deepcopy(config)
    config.update(changes)
    torch.manual_seed(seed)
    model = classes[kind](config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1 or name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.4)
    return model


@pytest.fixture(scope="module")
def one_thread():
    """On models as small as these, threads only wait for each other: ten times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=SHAPES)
def shape(request):
    return request.param


@pytest.fixture(scope="session")
def policy(shape):
    return build(shape, "policy", seed=1)


@pytest.fixture(scope="session")
def reference(shape):
    return build(shape, "policy", seed=2)


@pytest.fixture(scope="session")
def reward_network(shape):
    return build(shape, "score", seed=3)
