"""Several processes, here two on the CPU started by torchrun: they compute what one does, only the first writes, a
resume goes on as if nothing had been, and when one process dies all end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LIMIT = 120  # seconds until a test says that a job hangs
SMALL = "--prompts-per-update 8 --max-response-tokens 48 --eval-prompts 16".split()
ONE_STEP = [*SMALL, *"--num-updates 1 --num-epochs 1 --minibatch-size 8 --max-grad-norm 0".split()]
FOUR_UPDATES = [*SMALL, *"--num-updates 4 --num-epochs 1 --minibatch-size 4 --eval-every 2".split()]
FOUR_UPDATES += "--reward-fn reward.py:f --output-dir run".split()

# Short responses earn more. At call AT, which only the main process makes, it does DO; so a test needs no timing.
REWARD = """
import os, signal, time
calls = 0
def f(prompts, responses):
    global calls
    calls += len(prompts) > 1  # a call with a single prompt looks for the row that raised
    what = os.environ.get("DO") if calls == int(os.environ.get("AT", 0)) else ""
    if what == "raise":
        raise ValueError("no reward today")
    if what == "stop":
        os.kill(os.getppid(), signal.SIGTERM)  # torchrun, which sends it to every process
        time.sleep(2)
    return [-len(y) / 10 for y in responses]
"""
UPDATE_2 = "4"  # the second update's call of the reward: one of the SFT policy's responses, one evaluation, two updates


def two(script, *args, cwd, **env):
    """A script in two processes: (torchrun's exit code, what all said). It must end by itself."""
    path = script if str(script).endswith(".py") else ROOT / f"{script}.py"
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **env,
    }
    with open(cwd / "said.txt", "w+") as said:
        command = [*TORCHRUN, str(path), *map(str, args)]
        job = subprocess.Popen(command, cwd=cwd, env=env, stdout=said, stderr=subprocess.STDOUT)
        try:
            code = job.wait(LIMIT)
        except subprocess.TimeoutExpired:
            job.terminate()  # it takes its processes with it
            job.wait()
            pytest.fail(f"still running after {LIMIT} s: {Path(said.name).read_text()}")
        said.seek(0)
        return code, said.read()


def run_two(*args, **kwargs):
    code, said = two(*args, **kwargs)
    assert code == 0, said
    assert "Traceback" not in said
    return said


def lines(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def without_times(rows):
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and "_per_second" not in k}
        for row in rows
    ]


def checkpoint(folder):
    """What the last checkpoint of a run holds: its weights by name, and the state of Adam."""
    (last,) = (folder / "checkpoint").iterdir()
    return torch.load(last / "pytorch_model.bin"), torch.load(last / "optimizer.bin")["state"]


def assert_same_numbers(one, both, *names):
    """Runs in one and in two processes: what they logged, and Adam's mean gradients, agree to 1e-5 relative."""
    for name in names:
        expected, found = (without_times(lines(folder / name)) for folder in (one, both))
        assert found == [pytest.approx(row, rel=1e-5, abs=1e-6) for row in expected]
    expected, found = checkpoint(one)[1], checkpoint(both)[1]
    assert expected.keys() == found.keys() and len(expected) > 40
    pairs = [(expected[i]["exp_avg"], found[i]["exp_avg"]) for i in expected]
    largest = max(gradient.norm() for gradient, _ in pairs)
    for (
        gradient,
        other,
    ) in pairs:  # of the bias before a reward model's head: 0, scores are compared
        assert (gradient - other).norm() <= 1e-5 * max(gradient.norm(), 1e-3 * largest)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Five rows to learn from, of different lengths, and three held out."""
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", 5), ("test", 3)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for i in range(count):
                what = {"train": "a cactus ", "test": "a tree "}[name]
                prompt = f"\n\nHuman: How can I water {what * (i % 3 + 1)}?\n\nAssistant:"
                good, bad = f" Give it {'fresh ' * i}water.", " No."
                row = {"prompt": prompt, "completion": good, "chosen": good, "rejected": bad}
                file.write(json.dumps(row) + "\n")
    return folder


def test_p3o_takes_the_step_of_one_process(tmp_path):
    run("p3o_v1", *ONE_STEP, "--output-dir", "one", cwd=tmp_path)
    run_two("p3o_v1", *ONE_STEP, "--output-dir", "both", cwd=tmp_path)
    expected, found = (lines(tmp_path / name / "samples.jsonl") for name in ("one", "both"))
    assert [row["responses"] for row in found] == [row["responses"] for row in expected]
    assert_same_numbers(tmp_path / "one", tmp_path / "both", "metrics.jsonl")


def test_offline_takes_the_steps_of_one_process(rows, tmp_path):
    """The second of two minibatches has a single row, so that one process has none."""
    options = ["--num-updates", 2, "--dataset", rows, "--minibatch-size", 4, "--max-grad-norm", 0]
    options += ["--max-response-tokens", 32]
    run("dpo", *options, "--output-dir", "one", cwd=tmp_path)
    run_two("dpo", *options, "--output-dir", "both", cwd=tmp_path)
    one, both = tmp_path / "one", tmp_path / "both"
    assert len(lines(both / "metrics.jsonl")) == 2
    assert_same_numbers(one, both, "metrics.jsonl")
    weights, others = (checkpoint(folder)[0] for folder in (one, both))
    for name, weight in weights.items():
        # Attention does not depend on the bias of its keys: Adam makes steps of what is rounding error.
        assert (
            name.endswith("key_value.bias")
            or (weight - others[name]).norm() <= 1e-5 * weight.norm()
        ), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(folder, what was said) of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "reward.py").write_text(REWARD)
    return folder / "run", run_two("p3o_v1", *FOUR_UPDATES, cwd=folder)


def test_only_the_first_process_writes(undisturbed):
    folder, said = undisturbed
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    for name in ("frontier.jsonl", "samples.jsonl"):
        assert [row["step"] for row in lines(folder / name)] == [0, 2, 4]
    assert len([*folder.glob("events.out.tfevents.*")]) == 1
    for sentence in (
        "run folder ",
        "after 0 updates:",
        "after 2 updates:",
        "after 4 updates:",
        "saved in ",
    ):
        assert said.count(sentence) == 1


def test_resume_after_sigterm_ends_as_if_nothing_had_been(undisturbed, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    code, said = two("p3o_v1", *FOUR_UPDATES, cwd=tmp_path, DO="stop", AT=UPDATE_2)
    assert code != 0
    assert "stopped after 2 updates: the same command with --resume goes on" in said
    assert [row["step"] for row in lines(tmp_path / "run/metrics.jsonl")] == [1, 2]
    run_two("p3o_v1", *FOUR_UPDATES, "--resume", cwd=tmp_path)
    for name in ("metrics.jsonl", "frontier.jsonl", "samples.jsonl"):
        expected, found = (
            without_times(lines(folder / name)) for folder in (undisturbed[0], tmp_path / "run")
        )
        assert found == expected
    for expected, found in zip(checkpoint(undisturbed[0]), checkpoint(tmp_path / "run")):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("do, sentence", [("raise", "--reward-fn reward.py:f: ValueError('no rew")])
def test_all_end_when_one_dies(do, sentence, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    code, said = two("p3o_v1", *FOUR_UPDATES, cwd=tmp_path, DO=do, AT=UPDATE_2)
    assert code != 0
    assert sentence in said.replace("\n", " ")
    assert [row["step"] for row in lines(tmp_path / "run/metrics.jsonl")] == [1]
    assert not (tmp_path / "run/model").exists()
