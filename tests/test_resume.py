"""A run that was killed ends as if nothing had been; one that is asked otherwise is refused."""

import random
import shutil
import signal

import pytest
import torch
from conftest import EVERY, OFFLINE, ending
from scripts import KILL, Script, contents, lines, refused, run

FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"  # as a full disk: no file grows more
TEAR = (  # the system kills it in the middle of the write that takes a file beyond so many bytes
    "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)",
    "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    FULL.format(3_000_000),
)
FIRST_SAVE = ((KILL, "os.rename", "000001.part"), -signal.SIGKILL, ["000001.part"])
NOT_RENAMED = ((KILL, "os.rename", "000002.part"), -signal.SIGKILL, ["000001.pt", "000002.part"])
KEPT = ["000001.pt", "000002.pt"]
MOMENTS = [  # a line, an event and a file; the exit code; the checkpoints that are left
    FIRST_SAVE,
    (("raise KeyboardInterrupt", "os.rename", "000001.part"), 2, FIRST_SAVE[2]),  # Ctrl-C
    NOT_RENAMED,
    ((FULL.format(50), "os.truncate", "samples.jsonl"), 1, NOT_RENAMED[2]),
    ((KILL, "os.remove", "000001.pt"), -signal.SIGKILL, KEPT),
    (("; ".join(TEAR), "os.truncate", "samples.jsonl"), -signal.SIGXFSZ, [*KEPT, "000003.part"]),
    ((FULL.format(3_000_000), "os.truncate", "samples.jsonl"), 1, [*KEPT, "000003.part"]),
]
# By an alarm, which ends it as SIGKILL would, at any time since the run was opened
AT_RANDOM = f"signal.setitimer(signal.ITIMER_REAL, {random.uniform(0.001, 0.5)})"


def checkpoints(folder):
    return sorted(path.name.partition("-")[2] for path in folder.glob("checkpoint-*"))


def stop(moment, script, options, cwd):
    """Run a script until one of the MOMENTS."""
    disturb, expected, left = moment
    code, said = Script(script, *options, cwd=cwd, disturb=disturb).wait()
    assert code == expected, said
    assert checkpoints(cwd / "run") == left


@pytest.mark.parametrize("script", EVERY)
def test_a_killed_run_ends_as_if_nothing_had_been(script, flags, finished, tmp_path):
    """With --resume from the start, when there is nothing yet; one of them killed often."""
    options = [*flags[script], "--resume"]
    for moment in MOMENTS if script == "p3o_v2" else [NOT_RENAMED]:
        stop(moment, script, options, tmp_path)
    if script == "p3o_v2":
        disturb = (AT_RANDOM, "os.truncate", "samples.jsonl")
        code, said = Script(script, *options, cwd=tmp_path, disturb=disturb).wait()
        assert code in (0, -signal.SIGALRM), said
    assert "resumed" in run(script, *options, cwd=tmp_path)
    assert ending(tmp_path / "run") == ending(finished(script))
    assert checkpoints(tmp_path / "run") == ["000003.pt"]


@pytest.mark.parametrize("script", OFFLINE)
def test_a_resumed_run_finds_what_the_reference_said(script, flags, finished, tmp_path):
    """It does not ask again: in the meantime the answers have been changed, and these count."""
    for moment in (FIRST_SAVE, NOT_RENAMED):
        stop(moment, script, [*flags[script], "--resume"], tmp_path)
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


def test_both_options_resume_and_an_overwritten_run_loses_its_model(flags, finished, tmp_path):
    folder = shutil.copytree(finished("p3o_v2"), tmp_path / "run")
    options = [*flags["p3o_v2"], "--overwrite"]
    assert "resumed" in run("p3o_v2", *options, "--resume", cwd=tmp_path)
    stop(FIRST_SAVE, "p3o_v2", options, tmp_path)
    assert not (folder / "model").exists()


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
    options = [*flags[script], *more.split()]
    assert named in refused(script, *options, cwd=finished(script).parent)


@pytest.mark.parametrize("script", EVERY)
def test_a_run_is_not_resumed_with_data_that_have_changed(script, flags, finished, data, tmp_path):
    """Under the same name: here the run's record is made to name a folder with a row less."""
    folder = shutil.copytree(finished(script), tmp_path / "run")
    other = shutil.copytree(data, tmp_path / "data")
    rows = (data / "train.jsonl").read_text()
    (other / "train.jsonl").write_text(rows.partition("\n")[2])
    record = folder / "args.json"
    record.write_text(record.read_text().replace(str(data), str(other)))
    options = [*flags[script], "--dataset", other, "--resume"]
    assert "--dataset" in refused(script, *options, cwd=tmp_path)
