"""What holds for the scripts of the first plan, shown by some of them: they learn, go on as if nothing had been, refuse
what they can't use, and log what docs/metrics.md explains."""

import json
import re

import pytest
import torch
from conftest import ROOT, run
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo
import p3o_v1

ONLINE, OFFLINE = ("p3o_v1", "ppo", "online_dpo"), ("dpo", "ipo", "mpo")
SHOWN = ("p3o_v1", "ppo", "dpo")
TIMES = ("time/", "samples_per_second", "tokens_per_second")
SMALL = "--eval-prompts 8 --max-response-tokens 32 --micro-batch-size 16 --output-dir run".split()
SIZES = {
    script: [*SMALL, *"--prompts-per-update 8 --minibatch-size 4 --num-epochs 2".split()]
    for script in ONLINE
}
SIZES |= {
    script: [*SMALL, *"--minibatch-size 8 --lr-schedule constant".split()] for script in OFFLINE
}


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_times(rows):
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags for the embedded models on a few of their rows, so that offline scripts make no large store."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = (ROOT / "tiny/data/train.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(rows[:400]))
    return [
        "--model",
        ROOT / "tiny/sft",
        "--dataset",
        file,
        "--reward-model",
        ROOT / "tiny/reward_model",
    ]


# ----------------------------------------------------------------------------------------------------- shared parts
def test_the_learning_rate_rises_over_the_warm_up_then_follows_its_schedule(data, tmp_path):
    """Two updates of warm-up of four: 0, a half, all of it, then by the schedule."""
    flags = [*SIZES["dpo"], "--num-updates", 4, "--warmup-updates", 2, "--learning-rate", 1e-4]
    flags += ["--lr-schedule", "linear", "--eval-every", 0, "--save-every", 0]
    run("dpo", *data[:4], *flags, cwd=tmp_path)
    found = [row["lr"] / 1e-4 for row in lines(tmp_path / "run/metrics.jsonl")]
    assert found == pytest.approx([0, 0.5, 1, 0.5])


def test_gradients_repeat_to_the_last_bit():
    """Three responses to each of five prompts: where threads share them, an order of sums that is chance shows here."""
    model = p3o_v1.load_model(
        AutoModelForCausalLM, f"{p3o_v1.TINY}/sft", "--model", "cpu", p3o_v1.Args(), train=True
    )
    prompts = [torch.arange(3, 3 + n) for n in (20, 25, 30, 22, 27)]
    responses = [torch.arange(40, 40 + 18 + i % 7) for i in range(15)]

    def gradient():
        model.zero_grad()
        p3o_v1.response_logprobs(model, prompts, responses, 1.0).double().sum().backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(20))


# ------------------------------------------------------------------------------------------------------- every script
@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """{script: folder of a run of two updates, of some gone to after one}; what was logged of every kind."""
    folders = {}
    for script in (*ONLINE, *OFFLINE):
        folder = tmp_path_factory.mktemp(script)
        flags = [*data, *SIZES[script], "--eval-every", 1, "--num-updates"]
        if script in SHOWN:
            run(script, *flags, 1, cwd=folder)
        said = run(script, *flags, 2, "--resume", cwd=folder)
        assert ("resumed       from run/checkpoint/00000001" in said) == (script in SHOWN)
        if script == "dpo":
            assert re.search(r"store +runs/cache/\w+: made before", said)
        folders[script] = folder
    return folders


@pytest.mark.parametrize("script", SHOWN)
def test_a_run_that_went_on_is_one_that_went_through(script, data, runs, tmp_path):
    run(script, *data, *SIZES[script], "--num-updates", 2, "--eval-every", 1, cwd=tmp_path)
    for name in ("metrics.jsonl", "frontier.jsonl"):
        straight, resumed = (
            without_times(lines(folder / "run" / name)) for folder in (tmp_path, runs[script])
        )
        assert straight == resumed
    weights = [
        (folder / "run/model/model.safetensors").read_bytes() for folder in (tmp_path, runs[script])
    ]
    assert weights[0] == weights[1]


def test_every_key_is_explained(runs):
    text = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", text, re.M)
    explained = {key for row in rows for key in re.findall(r"`([\w/]+)`", row)}
    for folder in runs.values():
        for name in ("metrics.jsonl", "frontier.jsonl"):
            logged = {
                key.removesuffix("_se") for row in lines(folder / "run" / name) for key in row
            }
            assert logged - explained == {"step"}


@pytest.mark.parametrize("script", ["ppo"])
def test_online_scripts_learn_in_a_few_updates(script, tmp_path):
    """A reward that a few steps can reach: short responses."""
    (tmp_path / "my_reward.py").write_text(
        "def f(prompts, responses):\n    return [-len(y) / 10 for y in responses]\n"
    )
    options = "--num-updates 8 --prompts-per-update 16 --eval-every 0 --eval-prompts 64 --learning-rate 1e-3".split()
    run(script, *options, "--reward-fn", "my_reward.py:f", "--output-dir", "run", cwd=tmp_path)
    start, end = lines(tmp_path / "run/frontier.jsonl")
    assert end["reward"] - start["reward"] > 4 * (start["reward_se"] + end["reward_se"])


@pytest.mark.parametrize("script", ["dpo"])
def test_offline_scripts_learn_the_preferences_of_held_out_pairs(script, data, tmp_path):
    options = "--num-updates 24 --minibatch-size 16 --eval-every 0 --eval-prompts 40 --learning-rate 1e-3".split()
    run(
        script,
        *data[:4],
        *options,
        "--output-dir",
        "run",
        "--max-response-tokens",
        64,
        cwd=tmp_path,
    )
    start, end = lines(tmp_path / "run/frontier.jsonl")
    assert start["rewards/margins"] == pytest.approx(0, abs=1e-4) and end["rewards/margins"] > 0
    assert end["rewards/accuracies"] > 0.6
    assert "reward" not in end  # none was given


@pytest.mark.parametrize(
    "script, options, sentence",
    [
        ("ppo", ["--model", "no/such-folder"], "--model no/such-folder: no model is there"),
        ("mpo", ["--dataset", "nothing.jsonl"], "--dataset nothing.jsonl: no dataset is there"),
        ("online_dpo", ["--reward-fn", "nothing.py:f"], "expected FILE.py:FUNCTION"),
        ("ipo", ["--learning-rate", "-1"], "--learning-rate -1.0: expected at least 0"),
    ],
)
def test_mistakes_are_told_in_one_sentence(script, options, sentence, data, tmp_path):
    given = dict(zip(data[::2], data[1::2])) | dict(zip(options[::2], options[1::2]))
    said = run(script, *(x for pair in given.items() for x in pair), cwd=tmp_path, code=2)
    assert sentence in said
    assert {path.name for path in tmp_path.iterdir()} <= {"runs"}  # of a store, at most


def test_variants_of_ppo_run(data, tmp_path):
    flags = ["--share-trunk", "--dtype", "bfloat16", "--target-kl-adaptive", 6]
    run("ppo", *data, *SIZES["ppo"], "--num-updates", 2, *flags, cwd=tmp_path)
    rows = lines(tmp_path / "run/metrics.jsonl")
    assert all(abs(value) < 1e6 for row in rows for value in row.values())
    ratio = [row["objective/beta_raw"] for row in rows]
    assert ratio[1] != ratio[0]  # far below the target: beta falls


def test_held_out_prompts_are_the_same_in_every_script(tmp_path):
    """Also where rows are dropped that one kind of script can't use: no script trains on what another holds out."""
    file, tokenizer = tmp_path / "rows.jsonl", AutoTokenizer.from_pretrained(ROOT / "tiny/sft")
    rows = [
        {"prompt": f"Question {i}?", "chosen": "Yes." if i % 9 else " ", "rejected": "No."}
        for i in range(300)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = p3o_v1.load_prompts(tokenizer, p3o_v1.Args(dataset=str(file)))
    prompts, held_out = (set(tokenizer.batch_decode(x)) for x in found)
    parts = dpo.load_rows(tokenizer, [0], dpo.Args(dataset=str(file)), ("chosen", "rejected"))
    rows, held_out_rows = ({tokenizer.decode(row["prompt"]) for row in part} for part in parts)
    assert len(held_out) == 30 and 20 < len(held_out_rows) <= 30
    assert held_out_rows <= held_out and rows <= prompts
