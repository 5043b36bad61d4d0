"""Scripts as processes that start at once, and the files that they read and write."""

import atexit
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tiny"

# A process that has imported the libraries and forks one child for every script to run: the
# imports, several seconds, are paid once. It starts no thread, which a fork would lose.
NURSERY = """
import json, os, resource, runpy, signal, sys, traceback
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
    if child := os.fork():  # stays to tell its exit code, as the target of a link
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.symlink(str(code), f"{job['output']}.code")
        os._exit(0)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # what it prints stands before what it says later
    line, event, text = job["disturb"]
    sys.addaudithook(lambda name, x: name == event and text in str(x[0]) and exec(line))
    sys.argv, code = job["argv"], 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
"""


class Nursery:
    """A process to fork others from, with a change of the environment."""

    def __init__(self, **environment):
        quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command, env = [sys.executable, "-c", NURSERY], {**os.environ, **quiet, **environment}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=env)
        self.folder = tempfile.TemporaryDirectory()
        atexit.register(self.process.kill)


class Script:
    """A script as a process of its own. disturb: a line of Python that it runs just before an event
    of the file system (see sys.addaudithook), the event, and a part of the file's name."""

    nursery = None

    def __init__(self, script, *args, cwd, nursery=None, disturb=("", "", ""), **env):
        if not nursery:
            nursery = Script.nursery = Script.nursery or Nursery()
        path = script if str(script).endswith(".py") else ROOT / f"{script}.py"
        argv = [str(path), *map(str, args)]
        self.output = f"{nursery.folder.name}/{time.monotonic_ns()}"
        job = dict(argv=argv, cwd=str(cwd), env=env, disturb=disturb, output=self.output)
        print(json.dumps(job), file=nursery.process.stdin, flush=True)

    def wait(self):
        """Its exit code and what it printed."""
        code, end = f"{self.output}.code", time.monotonic() + 600
        while not os.path.islink(code):
            assert time.monotonic() < end, Path(self.output).read_text()
            time.sleep(0.01)
        return int(os.readlink(code)), Path(self.output).read_text()


def ended(process, code=0):
    """What a process printed, that must end with this exit code and without a traceback."""
    found, output = process.wait()
    assert found == code and "Traceback" not in output, output
    return output


def run(script, *args, cwd, code=0, **options):
    """Run a script to its end and return what it printed."""
    return ended(Script(script, *args, cwd=cwd, **options), code)


def refused(script, *args, cwd):
    """The sentence with which a script ends, on a line of its own, when it has changed no file."""
    before = contents(cwd)
    said = run(script, *args, cwd=cwd, code=2)
    told, _, sentence = said.partition(f"{script}.py: ")
    assert told[-1:] in ("", "\n") and contents(cwd) == before, said
    return sentence


def start_two(*args, **options):
    """Both of two processes, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [Script(*args, **options, **world, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


def run_two(*args, cwd):
    """Run a script in two processes to their ends and return what they printed."""
    return [ended(process) for process in start_two(*args, cwd=cwd)]


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


# -------------------------------------------------------------------------------------------- files
def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_splits(folder, train, test):
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "test.jsonl", test)


def write_reward(folder, result="range(len(prompts))"):
    """Flags for a reward that is this expression of prompts and responses."""
    (folder / "reward.py").write_text(f"def f(prompts, responses):\n    return {result}\n")
    return ["--reward-fn", "reward.py:f"]


def lines(file):
    with open(file, encoding="utf-8", newline="\n") as rows:
        return [json.loads(row, parse_constant=pytest.fail) for row in rows]


def assert_same(found, expected, left_out, rel, abs):
    """Rows of logs are equal but for rounding, but for times and keys of a pattern."""
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, other in zip(found, expected):
        for key in row:
            if not re.fullmatch(f"time/.*|{left_out}", key):
                near = pytest.approx(other[key], rel=rel, abs=abs)
                assert row[key] == near, (key, row[key], other[key])


def contents(folder):
    """{path: (bytes, time of the last change)} of all files in a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
