"""Runs that are killed, asked again or asked otherwise: a run that goes on ends as if nothing had
been, to the last bit."""

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import (
    EVERY,
    KILL,
    OFFLINE,
    ROOT,
    Script,
    contents,
    ending,
    lines,
    run,
    tiny_rows,
)

FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))"  # as a full disk
TEAR = (  # the system kills it in the middle of the write that takes a file beyond so many bytes
    "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)",
    "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    FULL,
)
MOMENTS = {  # line, event, file; exit code; the checkpoints that are left
    "in the first save": (
        (KILL, "os.rename", "checkpoint-000001.part"),
        -signal.SIGKILL,
        ["checkpoint-000001.part"],
    ),
    "written, not renamed": (
        (KILL, "os.rename", "checkpoint-000002.part"),
        -signal.SIGKILL,
        ["checkpoint-000001.pt", "checkpoint-000002.part"],
    ),
    "before the old one goes": (
        (KILL, "os.remove", "checkpoint-000001.pt"),
        -signal.SIGKILL,
        ["checkpoint-000001.pt", "checkpoint-000002.pt"],
    ),
    "half written": (
        ("; ".join(TEAR), "os.truncate", "samples.jsonl"),
        -signal.SIGXFSZ,
        ["checkpoint-000001.pt", "checkpoint-000002.pt", "checkpoint-000003.part"],
    ),
    "disk full": (
        (FULL, "os.truncate", "samples.jsonl"),
        1,
        ["checkpoint-000001.pt", "checkpoint-000002.pt", "checkpoint-000003.part"],
    ),
}


def kill_at_random(script, options, cwd, draw):
    """SIGKILL from outside, at any time since the run was opened."""
    before = list(cwd.glob("run/events.*"))
    process = Script(script, *options, cwd=cwd)
    ended = Path(f"{process.output}.code")
    while list(cwd.glob("run/events.*")) == before and not ended.exists():
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.5))
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    code, said = process.wait()
    assert code in (0, -signal.SIGKILL), said


def stop(disturb, name, script, options, cwd):
    """Run a script until one of the MOMENTS."""
    moment, expected, left = MOMENTS[name]
    code, said = Script(disturb, *moment, ROOT / f"{script}.py", *options, cwd=cwd).wait()
    assert code == expected, said
    assert sorted(path.name for path in (cwd / "run").glob("checkpoint-*")) == left


@pytest.mark.parametrize("script", EVERY)
def test_a_killed_run_ends_as_if_nothing_had_been(script, disturb, flags, finished, tmp_path):
    """With --resume from the start, when there is nothing yet; one of them killed often."""
    options = [*flags[script], "--resume"]
    first, second, *others = MOMENTS
    for name in [first, second, *others] if script == "p3o_v2" else [second]:
        stop(disturb, name, script, options, tmp_path)
    if script == "p3o_v2":
        kill_at_random(script, options, tmp_path, random.Random(script))
    assert "resumed" in run(script, *options, cwd=tmp_path)
    assert ending(tmp_path / "run") == ending(finished(script))
    found = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert found == ["checkpoint-000003.pt"]


def test_a_disk_that_is_full_when_a_run_goes_on_does_not_cost_its_settings(
    disturb, flags, finished, tmp_path
):
    options = [*flags["p3o_v2"], "--resume"]
    stop(disturb, "written, not renamed", "p3o_v2", options, tmp_path)
    full = FULL.replace("3_000_000", "50")
    command = (full, "os.truncate", "samples.jsonl", ROOT / "p3o_v2.py", *options)
    code, said = Script(disturb, *command, cwd=tmp_path).wait()
    assert code == 1, said
    run("p3o_v2", *options, cwd=tmp_path)
    assert ending(tmp_path / "run") == ending(finished("p3o_v2"))


@pytest.mark.parametrize("script", OFFLINE)
def test_a_resumed_run_finds_what_the_reference_said(script, disturb, flags, finished, tmp_path):
    """It does not ask again: in the meantime the answers have been changed, and these count."""
    for name in ("in the first save", "written, not renamed"):
        stop(disturb, name, script, [*flags[script], "--resume"], tmp_path)
    file = tmp_path / "run/reference.pt"
    stored, undisturbed = torch.load(file), torch.load(finished(script) / "reference.pt")
    if script == "mpo":
        (stored, samples), (undisturbed, others) = stored, undisturbed
        assert samples == others and len(samples) == len(stored)
    assert torch.equal(stored, undisturbed)
    stored[:, 0] += 1
    torch.save((stored, [[0]] * len(stored)) if script == "mpo" else stored, file)
    before = contents(file.parent)[file]
    run(script, *flags[script], "--resume", cwd=tmp_path)
    _, found, *_ = lines(tmp_path / "run/metrics.jsonl")
    _, expected, *_ = lines(finished(script) / "metrics.jsonl")
    scale = {"dpo": 0.1, "ipo": 0.1, "mpo": 1}[script]
    assert found["rewards/chosen"] == pytest.approx(expected["rewards/chosen"] - scale, abs=1e-5)
    assert found["rewards/rejected"] == pytest.approx(expected["rewards/rejected"], abs=1e-5)
    if script == "mpo":
        assert found["policy/ref_sample_logps"] != expected["policy/ref_sample_logps"]
    assert contents(file.parent)[file] == before  # a kill would leave the half of a new one


def test_a_run_goes_on_to_more_updates_also_in_a_folder_that_was_moved(flags, finished, tmp_path):
    run("p3o_v2", *flags["p3o_v2"], "--num-updates", 2, cwd=tmp_path)
    (tmp_path / "run").rename(tmp_path / "moved")
    more = ["--resume", "--output-dir", "moved", "--save-every", 0]
    assert "resumed" in run("p3o_v2", *flags["p3o_v2"], *more, cwd=tmp_path)
    assert ending(tmp_path / "moved") == ending(finished("p3o_v2"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
def test_files_of_the_user_stay_in_the_run_folder(option, flags, finished, tmp_path):
    folder = shutil.copytree(finished("p3o_v2"), tmp_path / "run")
    for name in ("model_60/weights.txt", "notes.jsonl", "checkpoint-best.pt", "checkpoint-1.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine\n" * 1000)
    mine = {path: found for path, found in contents(folder).items() if b"mine\n" in found[0]}
    assert len(mine) == 4
    updates = {"--overwrite": 2, "--resume": 4}[option]
    run("p3o_v2", *flags["p3o_v2"], option, "--num-updates", updates, cwd=tmp_path)
    assert len(lines(folder / "metrics.jsonl")) == updates
    after = contents(folder)
    assert {path: after.get(path) for path in mine} == mine


OTHERWISE = [  # script, flags, what the sentence names
    *[(script, "--resume --seed 2", "seed") for script in EVERY],
    ("p3o_v2", "", "--resume"),
    ("p3o_v2", "--resume --learning-rate 0.5", "learning_rate"),
    ("p3o_v2", "--resume --num-responses 4", "num_responses"),
    ("ppo", "--resume --lam 0.5", "lam"),
    ("dpo", "--resume --num-updates 5", "num_updates"),  # its learning rate depends on them
]


@pytest.mark.parametrize("script, more, named", OTHERWISE)
def test_a_run_is_not_resumed_with_other_settings(script, more, named, flags, finished):
    folder = finished(script)
    before = contents(folder)
    options = [*flags[script], "--output-dir", folder, *more.split()]
    said = run(script, *options, cwd=folder.parent, code=2)
    assert named in said.rpartition(f"{script}.py: ")[2]
    assert contents(folder) == before


@pytest.fixture(scope="module")
def other_data(data, tmp_path_factory):
    """A folder of the same name, with another row."""
    folder = shutil.copytree(data, tmp_path_factory.mktemp("other") / "data")
    with open(folder / "train.jsonl", "a") as file:
        file.write(json.dumps(tiny_rows("train", 30)[-1]) + "\n")
    return folder


@pytest.mark.parametrize("script", EVERY)
def test_a_run_is_not_resumed_with_data_that_have_changed(
    script, flags, finished, data, other_data, tmp_path
):
    """Under the same name: here the run's record is made to name the other folder."""
    folder = shutil.copytree(finished(script), tmp_path / "run")
    record = folder / "args.json"
    record.write_text(record.read_text().replace(str(data), str(other_data)))
    before = contents(folder)
    options = [*flags[script], "--dataset", other_data, "--resume"]
    said = run(script, *options, cwd=tmp_path, code=2)
    assert "--dataset" in said.rpartition(f"{script}.py: ")[2]
    assert contents(folder) == before
