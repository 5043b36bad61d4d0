"""Runs that are killed, stopped, damaged or asked again: one that goes on ends as one that nothing disturbed."""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import Script, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
TIMES = ("time/", "samples_per_second", "tokens_per_second")
FLAGS = "--output-dir run --num-updates 4 --save-every 1 --eval-every 2 --eval-prompts 4".split()
MORE = {
    "p3o_v1": "--prompts-per-update 4 --minibatch-size 2 --num-epochs 2 --max-response-tokens 16".split(),
    "dpo": "--minibatch-size 12 --data-epochs 2 --warmup-updates 2 --max-response-tokens 16".split(),  # two epochs
}

# Runs a script, and in it a line of Python just before every change to files whose path has TEXT in it, from the
# NUMBERth on. What torch writes, not Python, it does not see.
DISTURB = """
import errno, os, resource, runpy, signal, sys

line, text, number, *sys.argv = sys.argv[1:]
left, changes = int(number), {"os.mkdir", "os.rename", "os.truncate", "os.remove", "os.rmdir", "shutil.rmtree"}

def watch(event, values):
    global left
    if event in changes or event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR):
        left -= text in str(values[0])
        if left <= 0 and text in str(values[0]):
            exec(line)

sys.addaudithook(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
FULL = "raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))"
BLOCK = "open('run/checkpoint', 'w').close()"


def full_at(size):
    """No file can grow beyond so many bytes: to what writes it the same as a full disk."""
    return f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


def torn_at(size):
    """Killed by the system in the middle of the write that takes a file beyond so many bytes."""
    return f"{full_at(size)}; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); signal.signal(signal.SIGXFSZ, 0)"


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """{script: the flags of a short run of it}, on a file of few rows."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with open(ROOT / "tiny/data/train.jsonl") as lines:
        file.write_text("".join(islice(lines, 40)))
    return {script: [*FLAGS, *more, "--dataset", file] for script, more in MORE.items()}


def disturbed(script, line, text, number, *args, cwd):
    (cwd / "disturb.py").write_text(DISTURB)
    code, output = Script(
        cwd / "disturb.py", line, text, number, ROOT / f"{script}.py", *args, cwd=cwd
    ).wait()
    assert "Traceback" not in output
    return code, output


def rows(file):
    """The rows of a log, without times."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not key.startswith(TIMES)} for row in found
    ]


def ending(folder):
    """What a run leaves that must not depend on how often it was interrupted: weights, logs without times."""
    found = {
        "weights": hashlib.sha256((folder / "model/model.safetensors").read_bytes()).hexdigest()
    }
    found |= {file.name: rows(file) for file in folder.glob("*.jsonl")}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    for tag in events.Tags()["scalars"]:
        found[tag] = sorted((event.step, event.value) for event in events.Scalars(tag))
    for tag in events.Tags()["tensors"]:  # texts
        found[tag] = sorted(
            (event.step, *event.tensor_proto.string_val) for event in events.Tensors(tag)
        )
    return {key: value for key, value in found.items() if not key.startswith(TIMES)}


def contents(folder):
    """{path: (hash of its bytes, time of its last change)} of all files in a folder; of folders None."""
    found = dict.fromkeys(folder.rglob("*"))
    for file in filter(Path.is_file, found):
        found[file] = hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns
    return found


def refused(*args, cwd, said):
    """p3o_v1.py ends with exit code 2 and one sentence that says this; it changes nothing."""
    before = contents(cwd)
    output = run("p3o_v1", *args, cwd=cwd, code=2)
    assert contents(cwd) == before
    sentence = output[output.index("p3o_v1.py: ") :].strip()
    assert "\n" not in sentence and all(part in sentence for part in said), output


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    """{script: a finished run of it}."""
    folders = {script: tmp_path_factory.mktemp(script) for script in flags}
    for script, folder in folders.items():
        run(script, *flags[script], cwd=folder)
    return {script: folder / "run" for script, folder in folders.items()}


@pytest.fixture(scope="module")
def endings(undisturbed):
    return {script: ending(folder) for script, folder in undisturbed.items()}


@pytest.fixture(scope="module")
def killed_run(flags, tmp_path_factory):
    """A run of p3o_v1.py killed while saving its checkpoint after the third update."""
    folder = tmp_path_factory.mktemp("killed")
    code, _ = disturbed("p3o_v1", KILL, "00000003.part", 2, *flags["p3o_v1"], cwd=folder)
    assert code == -signal.SIGKILL
    assert sorted(path.name for path in (folder / "run/checkpoint").iterdir()) == [
        "00000002",
        "00000003.part",
    ]
    return folder


@pytest.fixture
def killed(killed_run, tmp_path):
    return shutil.copytree(killed_run, tmp_path / "killed")


def test_undisturbed_runs_log_every_step_once(endings):
    for found in endings.values():
        assert [row["step"] for row in found["metrics.jsonl"]] == [1, 2, 3, 4]
        assert [row["step"] for row in found["frontier.jsonl"]] == [0, 2, 4]
        assert [step for step, _ in found["policy/loss"]] == [1, 2, 3, 4]


# ----------------------------------------------------------------------------------------------------- killed, stopped
@pytest.mark.parametrize(
    "script, kills",
    [("p3o_v1", "saving torn any"), ("dpo", "saving")],
)
def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one(
    script, kills, flags, endings, tmp_path
):
    """At moments drawn by chance: between two changes to checkpoints, amid writing one of their files, at any time."""
    draw, record = random.Random(script), tmp_path / "run/args.json"
    for kill in kills.split():
        if kill == "any":
            before = record.stat().st_mtime_ns
            process = Script(script, *flags[script], "--resume", cwd=tmp_path)
            ended = Path(f"{process.output}.code")
            while (
                record.stat().st_mtime_ns == before and not ended.exists()
            ):  # until the script has opened the run
                time.sleep(0.01)
            time.sleep(draw.random())
            with suppress(ProcessLookupError):  # if it has ended, so be it
                os.kill(process.pid, signal.SIGKILL)
            assert process.wait()[0] in (-signal.SIGKILL, 0)
        else:
            moment = (
                KILL,
                "run/checkpoint/",
                draw.randint(1, 6),
            )  # in the first save or as the second begins
            if kill == "torn":
                moment = (torn_at(draw.randint(10**5, 4 * 10**6)), "run/checkpoint/", 1)
            code, _ = disturbed(script, *moment, *flags[script], "--resume", cwd=tmp_path)
            assert code == (-signal.SIGXFSZ if kill == "torn" else -signal.SIGKILL)
    run(script, *flags[script], "--resume", cwd=tmp_path)
    assert ending(tmp_path / "run") == endings[script]


@pytest.mark.parametrize(
    "script, name, code",
    [
        ("p3o_v1", "SIGINT", 130),
    ],
)
def test_a_stopped_run_saves_a_checkpoint_and_says_how_to_go_on(
    script, name, code, flags, endings, tmp_path
):
    options = [*flags[script], "--save-every", 0]
    signalled = f"os.kill(os.getpid(), signal.{name})"
    found, output = disturbed(script, signalled, "metrics.jsonl", 2, *options, cwd=tmp_path)
    assert found == code
    assert [line.partition(":")[0] for line in output.splitlines() if "--resume" in line] == [
        "stopped after 2 updates"
    ]
    assert "stopping after this update" in output  # at once, so that nobody presses again
    assert [path.name for path in (tmp_path / "run/checkpoint").iterdir()] == ["00000002"]
    assert not (tmp_path / "run/model").exists()
    assert "resumed" in run(script, *options, "--resume", cwd=tmp_path)
    assert ending(tmp_path / "run") == endings[script]


# --------------------------------------------------------------------------------------------- asked again, other flags
@pytest.mark.parametrize("script", ["p3o_v1"])
def test_a_finished_run_asked_again_is_left_alone(script, flags, undisturbed, tmp_path):
    shutil.copytree(undisturbed[script], tmp_path / "run")
    before = contents(tmp_path)
    assert "ended" in run(script, *flags[script], cwd=tmp_path)
    assert contents(tmp_path) == before


def test_a_finished_run_goes_on_to_more_updates(flags, endings, tmp_path):
    run("p3o_v1", *flags["p3o_v1"], "--num-updates", 2, cwd=tmp_path)
    assert "resumed" in run("p3o_v1", *flags["p3o_v1"], "--resume", cwd=tmp_path)
    assert ending(tmp_path / "run") == endings["p3o_v1"]


def test_an_unfinished_run_is_neither_replaced_nor_resumed_unasked(flags, killed):
    refused(*flags["p3o_v1"], cwd=killed, said=["has not ended", "--resume", "--overwrite"])


def test_a_run_with_other_settings_is_not_resumed(flags, killed):
    options = ["--resume", "--beta", 0.25, "--seed", 7]
    refused(*flags["p3o_v1"], *options, cwd=killed, said=["beta 0.2 (now 0.25)", "seed 1 (now 7)"])


def test_resume_begins_where_there_is_nothing_and_overwrite_anew(flags, endings, killed, tmp_path):
    for folder, option in ((tmp_path, "--resume"), (killed, "--overwrite")):
        assert "resumed" not in run(
            "p3o_v1", *flags["p3o_v1"], "--num-updates", 1, option, cwd=folder
        )
        (row,) = rows(folder / "run/metrics.jsonl")
        assert row == endings["p3o_v1"]["metrics.jsonl"][0]
        assert [path.name for path in (folder / "run/checkpoint").iterdir()] == ["00000001"]


# ----------------------------------------------------------------------------------------- damaged, disk full, blocked
def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change(file, **values):
    torch.save({**torch.load(file), **values}, file)


def another_runs_checkpoint(last):
    """That of a run which differs in --beta alone: its record, and its event file's name."""
    state = torch.load(last / "state.pt")
    files = {
        f"{name}.other" if "tfevents" in name else name: size
        for name, size in state["files"].items()
    }
    change(last / "state.pt", args={**state["args"], "beta": 0.3}, files=files)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda last: cut(last / "state.pt"), ["checkpoint/00000002"]),
        (lambda last: (last / "state.pt").unlink(), ["checkpoint/00000002", "state.pt"]),
        (lambda last: cut(last.parent.parent / "args.json"), ["run/args.json"]),
        (lambda last: change(last / "state.pt", format=2), ["format 2 (now 1)"]),
        (another_runs_checkpoint, ["beta 0.3 (now 0.2)"]),
    ],
    ids="state stateless args format another".split(),
)
def test_a_damaged_run_is_refused(damage, said, flags, killed):
    damage(killed / "run/checkpoint/00000002")
    refused(*flags["p3o_v1"], "--resume", cwd=killed, said=[*said, "--overwrite"])


def test_a_disk_full_again_and_again_ends_the_run_in_a_sentence_and_keeps_the_checkpoint(
    flags, endings, tmp_path
):
    """While a checkpoint, a log or the model is written; when there is room again, all goes on."""
    for line, text, number, last, said in (
        (FULL, "metrics.jsonl", 2, "00000001", "No space left"),
        (
            full_at(3 * 10**6),
            "00000002.part",
            1,
            "00000001",
            "run/checkpoint/00000002 could not be written",
        ),  # moments
        (full_at(10**6), "run/model.part", 1, "00000004", "run/model.part could not be written"),
    ):
        code, output = disturbed(
            "p3o_v1", line, text, number, *flags["p3o_v1"], "--resume", cwd=tmp_path
        )
        assert code == 1, output
        sentence, hint, *_ = output.partition("p3o_v1.py: ")[2].splitlines()
        assert said in sentence and "--resume" in hint
        assert [path.name for path in (tmp_path / "run/checkpoint").iterdir()] == [last], output
    run("p3o_v1", *flags["p3o_v1"], "--resume", cwd=tmp_path)
    assert ending(tmp_path / "run") == endings["p3o_v1"]
