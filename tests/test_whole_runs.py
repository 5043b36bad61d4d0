"""The scripts as processes: runs, kills and resumes, two processes, mistakes of a user."""

import copy
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT, Script, build, run
from datasets.packaged_modules.parquet.parquet import Parquet
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
)

TINY = ROOT / "tiny"
THREADS = str(torch.get_num_threads())  # as in all other processes, so that rounding is the same
EVERY = ("p3o_v2", "sft", "reward_model")
EVALUATIONS = {"p3o_v2": "frontier", "sft": "evaluations", "reward_model": "evaluations"}
LATER = "--minibatch-size 4 --max-response-tokens 24 --learning-rate 1e-3 --eval-prompts 4"
ONLINE = "--prompts-per-update 4 --minibatch-size 2 --num-epochs 1 --num-responses 2"
SIZES = {
    "p3o_v2": f"{ONLINE} --max-response-tokens 8 --learning-rate 2e-4 --eval-prompts 4".split(),
    "sft": LATER.split(),
    "reward_model": LATER.split(),
}
FOUR = "--num-updates 4 --save-every 1 --eval-every 2 --output-dir run".split()


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny_rows(name, n):
    """The first n rows with different prompts."""
    rows = {}
    with open(TINY / f"data/{name}.jsonl") as lines:
        for line in lines:
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


def run_all(jobs, at_once=3):
    """[(script, *args)], each with its folder last: run some at a time; all must end well."""
    waiting, running = deque(jobs), deque()
    while waiting or running:
        while waiting and len(running) < at_once:
            *command, cwd = waiting.popleft()
            running.append(Script(*command, cwd=cwd))
        code, said = running.popleft().wait()
        assert code == 0, said


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a train and a test split of a few rows of the embedded world."""
    folder = tmp_path_factory.mktemp("world") / "data"
    write_rows(folder / "train.jsonl", tiny_rows("train", 20))
    write_rows(folder / "test.jsonl", tiny_rows("test", 6))
    return folder


@pytest.fixture(scope="module")
def flags(data):
    """{script: the flags of a short run in the folder run}"""
    return {script: [*SIZES[script], *FOUR, "--dataset", data] for script in EVERY}


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """{script: the folder of a run that nothing disturbed}"""
    folders = {script: tmp_path_factory.mktemp(script) for script in EVERY}
    run_all([(script, *flags[script], folders[script]) for script in EVERY])
    return {script: folder / "run" for script, folder in folders.items()}


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


# ---------------------------------------------------------------------------- what a run leaves
@pytest.mark.parametrize("script", EVERY)
def test_a_run_leaves_its_settings_logs_and_a_model(script, finished):
    folder = finished[script]
    record = json.loads((folder / "args.json").read_text())
    assert record["script"] == script and record["seed"] == 1 and record["num_updates"] == 4
    metrics = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    evaluations = lines(folder / f"{EVALUATIONS[script]}.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    events = events_of(folder)
    for key in metrics[0].keys() - {"step"}:
        assert [event.step for event in events.Scalars(key)] == [1, 2, 3, 4]
        found = [event.value for event in events.Scalars(key)]
        assert found == pytest.approx([row[key] for row in metrics], rel=1e-5, abs=1e-30)
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-000004.pt"]
    kind = AutoModelForCausalLM
    if script == "reward_model":
        kind = AutoModelForSequenceClassification
    model, info = kind.from_pretrained(folder / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(folder / "model").eos_token_id == 0
    if script != "sft":  # which starts at random here
        start = AutoModelForCausalLM.from_pretrained(TINY / "sft").base_model.state_dict()
        end = model.base_model.state_dict()
        same = {name for name in start if torch.equal(start[name], end[name])}
        assert same <= {"final_layer_norm.bias"}  # no difference of scores depends on it


def test_policy_starts_at_the_reference_and_leaves_it(finished):
    start, *_, end = lines(finished["p3o_v2"] / "frontier.jsonl")
    assert start["kl"] == 0 and abs(start["kl_k1"]) < 1e-5 and start["win_rate_vs_sft"] == 0.5
    assert end["kl"] > 0
    rows = lines(finished["p3o_v2"] / "metrics.jsonl")
    assert all(row["val/ratio_init_error"] < 1e-4 for row in rows)
    assert abs(rows[0]["objective/kl"]) < 1e-5


def test_samples_are_a_table_of_held_out_answers(finished, data):
    rows = lines(finished["p3o_v2"] / "samples.jsonl")
    assert [row["step"] for row in rows] == [0] * 4 + [2] * 4 + [4] * 4
    held_out = {row["prompt"] for row in lines(data / "test.jsonl")}
    assert {row["prompt"] for row in rows} <= held_out
    assert len({row["prompt"] for row in rows[:4]}) == 4
    assert all(row["response"] == row["sft_response"] for row in rows[:4])


def test_the_later_stages_learn(finished):
    start, *_, end = lines(finished["sft"] / "evaluations.jsonl")
    assert end["sft/eval_loss"] < start["sft/eval_loss"]
    assert all(row["rm/loss"] > 0 for row in lines(finished["reward_model"] / "metrics.jsonl"))


@pytest.mark.parametrize("script", EVERY)
def test_checkpointing_and_micro_batches_change_rounding_only(script, flags, finished, tmp_path):
    more = ["--gradient-checkpointing", "--micro-batch-size", 1, "--num-updates", 1]
    run(script, *flags[script], *more, cwd=tmp_path)
    [found] = without_times(lines(tmp_path / "run/metrics.jsonl"))
    expected = lines(finished[script] / "metrics.jsonl")[0]
    of_a_part = ("policy/ratio_max", "policy/pair_weight_std", "val/ratio_init_error", "lr")
    for key in found.keys() - set(of_a_part):
        assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key


def test_bfloat16_starts_at_the_reference_to_the_bit(tmp_path):
    """And sampling agrees with training."""
    more = ["--num-updates", 3, "--dtype", "bfloat16", "--output-dir", "run"]
    run("p3o_v2", *SIZES["p3o_v2"], *more, cwd=tmp_path)  # the embedded world as it is
    start, *_, end = lines(tmp_path / "run/frontier.jsonl")
    assert start["kl"] == 0 < end["kl"] and start["gold"] < 0 < start["gold_se"]
    rows = lines(tmp_path / "run/metrics.jsonl")
    assert len(rows) == 3 and rows[0]["objective/kl"] == 0
    assert all(row["val/ratio_init_error"] < 0.5 for row in rows)
    dtypes = {
        weight.dtype for weight in load_file(tmp_path / "run/model/model.safetensors").values()
    }
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("script", ["sft", "reward_model"])
def test_the_later_stages_run_in_bfloat16(script, flags, finished, tmp_path):
    more = ["--dtype", "bfloat16", "--num-updates", 1]
    run(script, *flags[script], *more, cwd=tmp_path)
    loss = "sft/loss" if script == "sft" else "rm/loss"
    [found] = lines(tmp_path / "run/metrics.jsonl")
    expected = lines(finished[script] / "metrics.jsonl")[0][loss]
    assert found[loss] == pytest.approx(expected, rel=0.05) and found[loss] != expected


# --------------------------------------------------------------------- runs that end too soon
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
TEAR = (  # the system kills it in the middle of the write that takes a file beyond so many bytes
    "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)",
    "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    "resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))",
)
MOMENTS = {  # line, event, file; what is left
    "written, not renamed": (KILL, "os.rename", "checkpoint-000002.part"),
    "half written": ("; ".join(TEAR), "os.rename", "checkpoint-000002.part"),
    "before the old one goes": (KILL, "os.remove", "checkpoint-000002.pt"),
}
LEFT = {
    "written, not renamed": ["checkpoint-000001.pt", "checkpoint-000002.part"],
    "half written": ["checkpoint-000002.pt", "checkpoint-000003.part"],
    "before the old one goes": ["checkpoint-000002.pt", "checkpoint-000003.pt"],
}


def kill_at_random(script, options, cwd, draw):
    """SIGKILL from outside, at any time since the run was opened."""
    record = cwd / "run/args.json"
    before = record.stat().st_mtime_ns if record.exists() else None
    process = Script(script, *options, cwd=cwd)
    ended = Path(f"{process.output}.code")
    while not ended.exists():
        if record.exists() and record.stat().st_mtime_ns != before:
            break
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.5))
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    code, said = process.wait()
    assert code in (0, -signal.SIGKILL), said


@pytest.mark.parametrize("script", EVERY)
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_been(
    script, flags, finished, tmp_path
):
    """Within saves and at any moment. With --resume from the start, when there is nothing yet."""
    (tmp_path / "disturb.py").write_text(DISTURB)
    options = [*flags[script], "--resume"]
    for name, moment in MOMENTS.items():
        command = (*moment, ROOT / f"{script}.py", *options)
        code, said = Script(tmp_path / "disturb.py", *command, cwd=tmp_path).wait()
        assert code in (-signal.SIGKILL, -signal.SIGXFSZ), said
        found = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
        assert found == LEFT[name]
    kill_at_random(script, options, tmp_path, random.Random(script))
    assert "resumed" in run(script, *options, cwd=tmp_path)
    assert ending(tmp_path / "run") == ending(finished[script])
    found = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert found == ["checkpoint-000004.pt"]


def test_a_run_goes_on_to_more_updates_also_in_a_folder_that_was_moved(flags, finished, tmp_path):
    run("p3o_v2", *flags["p3o_v2"], "--num-updates", 2, cwd=tmp_path)
    (tmp_path / "run").rename(tmp_path / "moved")
    more = ["--resume", "--output-dir", "moved", "--save-every", 0]
    assert "resumed" in run("p3o_v2", *flags["p3o_v2"], *more, cwd=tmp_path)
    assert ending(tmp_path / "moved") == ending(finished["p3o_v2"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
def test_files_of_the_user_stay_in_the_run_folder(option, flags, finished, tmp_path):
    folder = shutil.copytree(finished["p3o_v2"], tmp_path / "run")
    for name in ("model_60/weights.txt", "notes.jsonl", "checkpoint-best.pt", "checkpoint-1.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine\n" * 1000)
    mine = {path: found for path, found in contents(folder).items() if b"mine\n" in found[0]}
    assert len(mine) == 4
    updates = {"--overwrite": 2, "--resume": 5}[option]
    run("p3o_v2", *flags["p3o_v2"], option, "--num-updates", updates, cwd=tmp_path)
    assert len(lines(folder / "metrics.jsonl")) == updates
    after = contents(folder)
    assert {path: after.get(path) for path in mine} == mine


@pytest.fixture(scope="module")
def other_data(data, tmp_path_factory):
    """A folder of the same name, with another row."""
    folder = shutil.copytree(data, tmp_path_factory.mktemp("other") / "data")
    with open(folder / "train.jsonl", "a") as file:
        file.write(json.dumps(tiny_rows("train", 30)[-1]) + "\n")
    return folder


@pytest.mark.parametrize(
    "script, options, named",
    [
        ("p3o_v2", [], "--resume"),
        ("p3o_v2", ["--resume", "--seed", 2], "seed"),
        ("p3o_v2", ["--resume", "--learning-rate", 0.5], "learning_rate"),
        ("sft", ["--resume", "--seed", 2], "seed"),
        ("reward_model", ["--resume", "--num-updates", 5], "num_updates"),
        ("p3o_v2", ["--resume", "--num-responses", 4], "num_responses"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(script, options, named, flags, finished):
    before = contents(finished[script])
    where = ["--output-dir", finished[script]]
    said = run(script, *flags[script], *where, *options, cwd=finished[script].parent, code=2)
    assert named in said.rpartition(f"{script}.py: ")[2]
    assert contents(finished[script]) == before


@pytest.mark.parametrize("script", EVERY)
def test_a_run_is_not_resumed_with_data_that_have_changed(
    script, flags, finished, data, other_data, tmp_path
):
    """Under the same name: here the run's record is made to name the other folder."""
    folder = shutil.copytree(finished[script], tmp_path / "run")
    record = folder / "args.json"
    record.write_text(record.read_text().replace(str(data), str(other_data)))
    before = contents(folder)
    options = [*flags[script], "--dataset", other_data, "--resume"]
    said = run(script, *options, cwd=tmp_path, code=2)
    assert "--dataset" in said.rpartition(f"{script}.py: ")[2]
    assert contents(folder) == before


# ------------------------------------------------------------------------------- two processes
def start_two(script, *args, cwd):
    """Both of two processes, joined by gloo, without the launcher."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    address["OMP_NUM_THREADS"] = THREADS
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [Script(script, *args, cwd=cwd, **address, **rank) for rank in ranks]


def run_two(*args, cwd):
    for process in start_two(*args, cwd=cwd):
        code, said = process.wait(120)
        assert code == 0 and "Traceback" not in said, said


@pytest.mark.parametrize("script", EVERY)
def test_two_processes_take_the_steps_of_one(script, flags, tmp_path):
    """With one minibatch and one epoch an update."""
    options = [*flags[script], "--minibatch-size", 4, "--num-updates", 1, "--max-grad-norm", 0]
    run(script, *options, "--output-dir", "one", cwd=tmp_path)
    run_two(script, *options, "--output-dir", "two", cwd=tmp_path)
    [one], [two] = (lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    of_a_part = ("policy/ratio_max", "policy/pair_weight_std", "val/ratio_init_error")
    for key in one:
        if not key.startswith("time/") and key not in of_a_part:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key
    name = f"{EVALUATIONS[script]}.jsonl"
    for found, expected in zip(lines(tmp_path / "two" / name), lines(tmp_path / "one" / name)):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert len(list((tmp_path / "two").glob("events.out.tfevents.*"))) == 1


def test_a_job_of_two_ends_when_one_is_killed_and_resumes_as_if_nothing_had_been(flags, tmp_path):
    (tmp_path / "disturb.py").write_text(DISTURB)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", 2, tmp_path / "disturb.py"]
    command += [KILL, "os.rename", "checkpoint-000003.part"]
    command += [ROOT / "p3o_v2.py", *flags["p3o_v2"]]
    environment = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": THREADS, "OMP_WAIT_POLICY": "PASSIVE"}
    with open(tmp_path / "said.txt", "w") as said:
        job = subprocess.Popen(
            list(map(str, command)),
            cwd=tmp_path,
            env={**os.environ, **environment},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    run_two("p3o_v2", *flags["p3o_v2"], "--output-dir", "undisturbed", cwd=tmp_path)
    assert job.wait(300) != 0, (tmp_path / "said.txt").read_text()
    assert [row["step"] for row in lines(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]
    assert not (tmp_path / "run/model").exists()
    run_two("p3o_v2", *flags["p3o_v2"], "--resume", cwd=tmp_path)
    assert ending(tmp_path / "run") == ending(tmp_path / "undisturbed")


# ------------------------------------------------------------------------ models and data forms
def save(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(TINY / "sft")
    tokenizer.save_pretrained(folder)


def text_of(tokens, number):
    """A text of so many tokens of the embedded world's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "sft")
    ids = tokenizer(" Wash the window." * 40).input_ids
    end = tokenizer(f" {number}.").input_ids
    text = tokenizer.decode(ids[: tokens - len(end)] + end)
    assert len(tokenizer(text).input_ids) == tokens
    return text


@pytest.mark.parametrize("script", EVERY)
def test_learned_positions_are_used_to_the_last_and_never_beyond(script, tmp_path):
    """64 of them: 16 for the response, 48 for the prompt; one prompt more is too long."""
    save(build("gpt2", "policy", seed=1, vocab_size=768), tmp_path / "gpt2")
    (tmp_path / "reward.py").write_text(
        "def f(prompts, responses):\n    return range(len(prompts))"
    )
    rows = []
    for number, length in enumerate([48, 48, 48, 9, 47, 48, 49]):
        answers = {"completion": " Wash it." * 9, "chosen": " Wash." * 12, "rejected": " No."}
        rows.append({"prompt": text_of(length, number), **answers})
    write_rows(tmp_path / "data/train.jsonl", rows[1:])
    write_rows(tmp_path / "data/test.jsonl", rows[:1] * 2)
    options = [*SIZES[script], "--num-updates", 2, "--max-response-tokens", 16, "--model", "gpt2"]
    if script == "p3o_v2":
        options += ["--reward-fn", "reward.py:f", "--missing-eos-penalty", 1]
    said = run(script, *options, "--dataset", "data", "--output-dir", "run", cwd=tmp_path)
    [counted] = [line for line in said.splitlines() if line.startswith("training")]
    if script == "p3o_v2":
        # Kept, rows, repeated, otherwise dropped, too long, the limit
        assert re.findall(r"\d+", counted) == ["5", "6", "0", "0", "1", "48"]
    else:
        assert "5 examples" in counted and "prompts of more than 48 tokens dropped': 1" in counted
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 2


def test_a_model_whose_training_ignores_its_window_is_refused(data, tmp_path):
    """Sampling forgets what is outside, training does not."""
    save(build("mistral", "policy", seed=1, vocab_size=768), tmp_path / "mistral")
    (tmp_path / "reward.py").write_text(
        "def f(prompts, responses):\n    return range(len(prompts))"
    )
    options = [*SIZES["p3o_v2"], "--model", "mistral", "--reward-fn", "reward.py:f"]
    said = run("p3o_v2", *options, "--dataset", data, cwd=tmp_path, code=2)
    assert "--model mistral" in said.rpartition("p3o_v2.py: ")[2]
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_only_the_last_layer_and_an_untied_head_change(data, tmp_path):
    save(build("gpt_neox", "policy", seed=1, vocab_size=768), tmp_path / "untied")
    (tmp_path / "reward.py").write_text(
        "def f(prompts, responses):\n    return range(len(prompts))"
    )
    options = [*SIZES["p3o_v2"], "--model", "untied", "--reward-fn", "reward.py:f"]
    options += ["--unfrozen-layers", 1, "--num-updates", 1, "--dataset", data]
    run("p3o_v2", *options, "--output-dir", "run", cwd=tmp_path)
    start, end = (load_file(tmp_path / f"{x}/model.safetensors") for x in ("untied", "run/model"))
    assert start.keys() == end.keys()
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == {name for name in start if ".layers.1." in name or "embed_out" in name}
    assert changed


def test_three_stages_find_each_other_on_dialogues(tmp_path):
    """For a folder model that is not tiny, and a file in HH's form without a held-out split."""
    base = tmp_path / "models/small"
    shutil.copytree(TINY / "sft", base)
    rows = []
    for i in range(40):
        start = f"\n\nHuman: Name a number.\n\nAssistant: Which?\n\nHuman: {i} + 1\n\nAssistant:"
        rows.append({"chosen": f"{start} It is {i + 1}.", "rejected": f"{start} No."})
    write_rows(tmp_path / "numbers.jsonl", rows)
    common = ["--model", "models/small", "--dataset", "numbers.jsonl", "--num-updates", 3]
    for script in ("sft", "reward_model", "p3o_v2"):
        run(script, *SIZES[script], *common, cwd=tmp_path)
    folders = {script: f"runs/{script}/numbers.jsonl/small" for script in EVERY}
    records = {
        script: json.loads((tmp_path / folder / "args.json").read_text())
        for script, folder in folders.items()
    }
    assert records["sft"]["policy"] == "models/small"
    assert records["reward_model"]["policy"] == f"{folders['sft']}/model"
    assert records["p3o_v2"]["policy"] == f"{folders['sft']}/model"
    assert records["p3o_v2"]["reward"] == f"{folders['reward_model']}/model"
    start, *others = (
        load_file(folder / "model.safetensors")
        for folder in (base, *(tmp_path / folder / "model" for folder in folders.values()))
    )
    for other in others:
        same = {name for name in start if torch.equal(start[name], other[name])}
        assert same <= {"gpt_neox.final_layer_norm.bias"}  # no difference of scores depends on it
    samples = lines(tmp_path / folders["p3o_v2"] / "samples.jsonl")
    assert all(row["prompt"].endswith("+ 1\n\nAssistant:") for row in samples)


def test_one_held_out_prompt_gives_numbers(flags, tmp_path):
    """There is no standard error then, but what is logged is JSON."""
    options = ["--num-updates", 1, "--eval-prompts", 1]
    run("p3o_v2", *flags["p3o_v2"], *options, cwd=tmp_path)
    assert [row["step"] for row in lines(tmp_path / "run/frontier.jsonl")] == [0, 1]


@pytest.mark.parametrize("result, code", [("[0.0]", 2), ("1 / 0", 1)])
def test_a_reward_function_that_goes_wrong_ends_the_run(result, code, flags, tmp_path):
    """Wrong numbers in a sentence; an exception in a traceback into the file of its author."""
    source = f"def f(prompts, responses):\n    return {result}\n"
    (tmp_path / "my_reward.py").write_text(source)
    options = [*flags["p3o_v2"], "--reward-fn", "my_reward.py:f"]
    found, said = Script("p3o_v2", *options, cwd=tmp_path).wait()
    assert found == code, said
    assert ("Traceback" in said and "my_reward.py" in said) == (code == 1)
    assert ("p3o_v2.py: the reward function" in said) == (code == 2)


# ------------------------------------------------------------------------------- public models
END = "<|endoftext|>"


def save_in_hub(name, model, hub, tokenizer_config, added=()):
    """A repository in the layout of the hub's cache, with files as the public ones have them."""
    repository = hub / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots/0123456789abcdef"
    model.save_pretrained(folder)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123456789abcdef")
    tokenizer = json.loads((TINY / "sft/tokenizer.json").read_text())
    tokenizer["added_tokens"] += added
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False}
    config |= {key: END for key in ("bos_token", "eos_token", "unk_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **tokenizer_config}))
    return folder


def save_public_models(hub):
    special = {"vocab_size": 784, "bos_token_id": 0, "eos_token_id": 0}  # more than it has tokens
    policy = build("gpt_neox", "policy", seed=1, **special, max_position_embeddings=512)
    folder = save_in_hub("trl-lib/pythia-1b-deduped-tldr-sft", policy, hub, {})
    (folder / "generation_config.json").write_text('{"bos_token_id": 0}')
    reward = build("gpt_neox", "score", seed=2, **special, max_position_embeddings=512).half()
    pad = {"id": 768, "content": "[PAD]", "special": True, "normalized": False}
    pad |= {"single_word": False, "lstrip": False, "rstrip": False}
    name = "cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr"
    folder = save_in_hub(name, reward, hub, {"pad_token": "[PAD]"}, [pad])
    assert "score.bias" not in reward.state_dict()
    torch.save(reward.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def save_public_data(folder, tmp_path):
    """Posts and news articles, as `datasets` keeps them."""
    files = {}
    for split, n in (("train", 30), ("validation", 12)):
        rows = []
        for i in range(n):
            prompt = f"SUBREDDIT: r/tea\n\nTITLE: {split} {i}\n\nPOST: Is tea good?\n\nTL;DR:"
            if split == "validation" and i % 2:
                prompt = f"TITLE: news {i}\n\nPOST: Tea is good.\n\nTL;DR:"
            rows.append({"prompt": prompt, "chosen": " Tea.", "rejected": " No."})
        files[split] = [str(tmp_path / f"{split}.parquet")]
        datasets.Dataset.from_list(rows).to_parquet(files[split][0])
    name = "tldr-preference"
    builder = Parquet(cache_dir=str(tmp_path), dataset_name=name, hash="0123", data_files=files)
    builder.download_and_prepare()
    shutil.copytree(builder.cache_dir, folder / f"trl-lib___{name}/default/0.0.0/0123")


def test_the_users_own_command_runs_to_the_end_with_nothing_prepared(tmp_path):
    """p3o_v2.py --model pythia-1b, with the public models and data in the cache of the hub."""
    home = tmp_path / "home"
    save_public_models(home / "hub")
    save_public_data(home / "datasets", tmp_path / "built")
    environment = {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **{key: str(value) for key, value in environment.items()}}
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        environment.pop(name, None)
    command = "p3o_v2.py --model pythia-1b --num-updates 3".split()
    sizes = f"{ONLINE} --eval-prompts 4 --max-response-tokens 16 --eval-every 2".split()
    done = subprocess.run(
        [sys.executable, ROOT / command[0], *command[1:], *sizes],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for name in ("trl-lib/pythia-1b-deduped-tldr-sft", "cleanrl/EleutherAI_pythia-1b-deduped"):
        assert name in done.stdout
    [counted] = [line for line in done.stdout.splitlines() if line.startswith("held-out")]
    assert re.findall(r"\d+", counted)[:4] == ["6", "12", "0", "6"]  # the news articles are counted
    folder = tmp_path / "runs/p3o_v2/tldr/pythia-1b"
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [1, 2, 3]
    points = lines(folder / "frontier.jsonl")
    assert points[0]["kl"] == 0 and points[-1]["kl"] > 0 and points[0]["reward_se"] > 0
    samples = lines(folder / "samples.jsonl")
    assert all(row["prompt"].startswith("SUBREDDIT") for row in samples)
    assert AutoModelForCausalLM.from_pretrained(folder / "model").config.vocab_size == 784


def test_for_other_sizes_the_stages_before_are_named(tmp_path):
    said = run("p3o_v2", "--model", "pythia-410m", cwd=tmp_path, code=2)
    sentence = said.rpartition("p3o_v2.py: ")[2]
    for named in ("sft.py", "reward_model.py", "--model pythia-410m", "--dataset tldr"):
        assert named in sentence
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- mistakes of a user
def write_inputs(folder):
    rows = []
    for i in range(24):
        prompt = f"\n\nHuman: How do I make tea? Say {i}.\n\nAssistant:"
        answers = {"completion": " Okay.", "chosen": " Okay. Fine.", "rejected": " Not this."}
        rows.append({"prompt": prompt, **answers})
    write_rows(folder / "ok/train.jsonl", rows[4:])
    write_rows(folder / "ok/test.jsonl", rows[:4])
    write_rows(folder / "one_row.jsonl", rows[:1])
    write_rows(folder / "misnamed.jsonl", [{"question": "What?", "answer": "That."}] * 20)
    messages = [{"role": "user", "content": "Hi"}]
    write_rows(folder / "messages.jsonl", [dict.fromkeys(rows[0], messages)] * 20)
    (folder / "broken.jsonl").write_text(json.dumps(rows[0]) + '\n{"prompt": "Hi"\n')
    (folder / "broken.json").write_text('[{"prompt": "Hi"')
    (folder / "reward.py").write_text("def f(prompts, responses):\n    return [0] * len(prompts)\n")
    (folder / "file").write_text("mine")
    (folder / "full").mkdir()
    (folder / "full/notes.txt").write_text("mine")
    (folder / "no_model").mkdir()
    (folder / "other_program/model").mkdir(parents=True)
    (folder / "other_program/args.json").write_text('{"lr": 0.1}')
    (folder / "other_program/model/notes.txt").write_text("mine")

    tokenizer = AutoTokenizer.from_pretrained(TINY / "sft")
    policy = AutoModelForCausalLM.from_pretrained(TINY / "sft", dtype=torch.float32)
    no_end, larger = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    no_end.eos_token = None
    save(policy, folder / "no_end", no_end)
    larger.add_tokens(["<one>"])
    policy.resize_token_embeddings(769)
    save(policy, folder / "larger", larger)
    save(build("gpt2", "policy", seed=1, vocab_size=768), folder / "gpt2")
    for name, labels in (("two_outputs", 2), ("other_tokens", 1)):
        config = GPTNeoXConfig.from_pretrained(TINY / "sft", num_labels=labels)
        save(GPTNeoXForSequenceClassification(config), folder / name)
    file = folder / "other_tokens/tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


GIVEN = "--reward-fn in/reward.py:f"
# script, flags, what the sentence names (or what is printed before it, where it is None)
MISTAKES = [
    *[(script, "--dataset nothing.jsonl", "nothing.jsonl") for script in EVERY],
    *[(script, "--dataset in/broken.jsonl", "in/broken.jsonl") for script in EVERY],
    *[(script, "--dataset in/misnamed.jsonl", "in/misnamed.jsonl") for script in EVERY],
    *[(script, "--dataset in/messages.jsonl", "prepare_data.py") for script in EVERY],
    *[(script, "--minibatch-size 0", "--minibatch-size") for script in EVERY],
    *[(script, "--max-prompt-tokens 1", "in/ok") for script in EVERY],
    *[(script, "--output-dir in/full", "in/full") for script in EVERY],
    ("p3o_v2", "--dataset no/such-data", "no/such-data"),
    ("p3o_v2", "--dataset in/broken.json", "in/broken.json"),
    ("sft", "--dataset in/one_row.jsonl", "in/one_row.jsonl"),
    ("p3o_v2", f"--model no/such-model {GIVEN}", None),
    ("sft", "--model no/such-model", None),
    ("reward_model", "--model no/such-model", None),
    ("sft", "--model in/no_model", "in/no_model"),
    ("p3o_v2", f"--model in/no_end {GIVEN}", "in/no_end"),
    ("reward_model", "--model in/no_end", "in/no_end"),
    ("p3o_v2", f"--model in/gpt2 --max-response-tokens 64 {GIVEN}", "in/ok"),
    ("sft", "--model in/gpt2 --max-response-tokens 80", "in/ok"),
    # numbers
    ("p3o_v2", "--seed -1", "--seed"),
    ("sft", "--learning-rate -1", "--learning-rate"),
    ("p3o_v2", "--beta nan", "--beta"),
    ("p3o_v2", "--temperature 0", "--temperature"),
    ("reward_model", "--eval-prompts 0", "--eval-prompts"),
    ("sft", "--data-epochs -1", "--data-epochs"),
    ("reward_model", "--micro-batch-size -2", "--micro-batch-size"),
    ("p3o_v2", "--minibatch-size 3", "--minibatch-size 3"),
    ("p3o_v2", "--num-responses 1", "--num-responses 1"),
    ("p3o_v2", "--no-such-flag", "--no-such-flag"),
    # rewards
    ("p3o_v2", "--model in/gpt2", "reward_model.py"),
    ("p3o_v2", "--reward-model no/such-model", None),
    ("p3o_v2", f"--reward-model {TINY}/sft", f"{TINY}/sft"),
    ("p3o_v2", "--reward-model in/two_outputs", "in/two_outputs"),
    ("p3o_v2", "--reward-model in/other_tokens", "in/other_tokens"),
    ("p3o_v2", f"--model in/larger --reward-model {TINY}/reward_model", f"{TINY}/reward_model"),
    ("p3o_v2", "--reward-fn nowhere.py:f", "nowhere.py"),
    ("p3o_v2", "--gold-fn in/reward.py:g", "in/reward.py:g"),
    # folders of others
    ("p3o_v2", "--output-dir in/file", "in/file"),
    ("p3o_v2", "--output-dir in/full --overwrite", "in/full"),
    ("sft", "--output-dir in/full --resume", "in/full"),
    ("p3o_v2", "--output-dir in/other_program --overwrite", "in/other_program"),
    ("p3o_v2", "--output-dir in/other_program --resume", "in/other_program"),
]


@pytest.fixture(scope="module")
def outcomes(inputs, tmp_path_factory):
    """{case: (exit code, output, folder where it ran)}, with `inputs` as in/; some at a time."""
    waiting, running, found = deque(MISTAKES), deque(), {}
    while waiting or running:
        while waiting and len(running) < 3:
            case = waiting.popleft()
            script, mistake, _ = case
            folder = tmp_path_factory.mktemp("case")
            if "in/full" in mistake or "in/other_program" in mistake or "in/file" in mistake:
                shutil.copytree(inputs, folder / "in")
            else:
                (folder / "in").symlink_to(inputs)
            options = ["--num-updates", "1", *SIZES[script], "--dataset", "in/ok"]
            options += mistake.split()
            running.append((case, contents(folder), Script(script, *options, cwd=folder), folder))
        case, before, process, folder = running.popleft()
        found[case] = (*process.wait(), before, folder)
    return found


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: " ".join(case[:2]))
def test_a_mistake_is_told_in_a_sentence_before_anything_is_written(case, outcomes):
    code, said, before, folder = outcomes[case]
    script, mistake, named = case
    assert code == 2 and "Traceback" not in said, said
    if named is None:
        assert f"\n{script}.py: " in said and mistake.split()[1] in said
    elif mistake == "--no-such-flag":  # tyro's to refuse
        assert named in said
    else:
        before_it, _, sentence = said.rpartition(f"{script}.py: ")
        assert named in sentence and before_it[-1:] in ("", "\n"), said
    assert [path.name for path in folder.iterdir()] == ["in"]
    assert contents(folder) == before


@pytest.mark.parametrize("script", EVERY)
def test_help_tells_every_flag(script, tmp_path):
    said = run(script, "--help", cwd=tmp_path)
    for name in vars(importlib.import_module(script).Args()):
        assert f"--{name.replace('_', '-')}" in said


def test_track_logs_to_weights_and_biases_without_a_network(data, tmp_path):
    """In a process of its own: W&B ends its run when the interpreter exits."""
    options = [*SIZES["p3o_v2"], "--dataset", data, "--output-dir", "run", "--track"]
    command = [sys.executable, ROOT / "p3o_v2.py", *map(str, options)]
    environment = {**os.environ, "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"objective/reward" in kept.read_bytes() and b"prompts_per_update" in kept.read_bytes()
