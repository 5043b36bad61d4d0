"""The scripts as their users run them: subprocesses with small sizes, on the tiny world and on local folders."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).parent.parent
TIMES = ("time/", "samples_per_second", "tokens_per_second")
SMALL = "--num-updates 3 --prompts-per-update 8 --num-epochs 2 --minibatch-size 4 --max-response-tokens 48".split()
SMALL += "--eval-every 2 --eval-prompts 16".split()


def lines(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def without_times(rows):
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]


@pytest.fixture(scope="module")
def p3o_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("p3o")
    run("p3o_v2", *SMALL, cwd=folder)
    return folder / "runs/p3o_v2/tiny/tiny"


def test_run_folder_holds_what_the_readme_says(p3o_run):
    record = json.loads((p3o_run / "args.json").read_text())
    assert (
        record["base_name"] == "tiny"
        and record["args"]["num_updates"] == 3
        and "torch" in record["versions"]
    )
    assert [row["step"] for row in lines(p3o_run / "metrics.jsonl")] == [1, 2, 3]
    frontier = lines(p3o_run / "frontier.jsonl")
    assert [point["step"] for point in frontier] == [0, 2, 3]
    wanted = {
        "kl",
        "kl_se",
        "kl_k1",
        "reward",
        "reward_se",
        "gold",
        "length",
        "eos_rate",
        "win_rate_vs_sft",
    }
    assert all(wanted <= point.keys() for point in frontier)
    samples = lines(p3o_run / "samples.jsonl")
    assert all(
        len(row[key]) == 16 for row in samples for key in ("prompts", "responses", "rewards")
    )
    assert list(p3o_run.glob("events.out.tfevents.*"))


def test_policy_starts_at_the_reference_and_leaves_it(p3o_run):
    start, *_, end = lines(p3o_run / "frontier.jsonl")
    assert start["kl"] == start["kl_k1"] == 0
    assert end["kl"] > 0


def test_ratio_starts_at_one_in_every_update(p3o_run):
    assert all(row["val/ratio_init_error"] <= 1e-3 for row in lines(p3o_run / "metrics.jsonl"))


def test_saved_policy_loads_anywhere_and_differs_from_its_start(p3o_run):
    saved = AutoModelForCausalLM.from_pretrained(p3o_run / "model", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/sft", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(p3o_run / "model").eos_token_id == 0
    changed = [not torch.equal(a, b) for a, b in zip(saved.parameters(), start.parameters())]
    assert all(changed)


def test_same_seed_same_numbers_other_seed_others(p3o_run, tmp_path):
    run("p3o_v2", *SMALL, "--output-dir", "again", cwd=tmp_path)
    run("p3o_v2", *SMALL, "--output-dir", "other", "--seed", 2, cwd=tmp_path)
    for name in ("metrics.jsonl", "frontier.jsonl", "samples.jsonl"):
        first, again, other = (
            without_times(lines(f / name))
            for f in (p3o_run, tmp_path / "again", tmp_path / "other")
        )
        assert first == again
        assert first != other


LEAN = ["--dtype", "bfloat16", "--gradient-checkpointing", "--unfrozen-layers", 2]


@pytest.mark.parametrize("options", [["--num-responses", 4], ["--clip-range", 0], LEAN])
def test_variants_run(options, tmp_path):
    run("p3o_v2", *SMALL, *options, cwd=tmp_path)
    rows = lines(tmp_path / "runs/p3o_v2/tiny/tiny/metrics.jsonl")
    assert all(abs(value) < 1e6 for row in rows for value in row.values())
    if options[0] == "--clip-range":
        assert all(row["policy/clipfrac"] == 0 for row in rows)


def test_reward_function_is_learned_in_a_few_updates(tmp_path):
    """A reward that a few steps can reach: short responses."""
    (tmp_path / "my_reward.py").write_text(
        "def f(prompts, responses):\n    return [-len(y) / 10 for y in responses]\n"
    )
    options = "--num-updates 8 --prompts-per-update 32 --eval-every 0 --eval-prompts 64 --learning-rate 1e-3".split()
    run("p3o_v2", *options, "--reward-fn", "my_reward.py:f", cwd=tmp_path)
    start, end = lines(tmp_path / "runs/p3o_v2/tiny/tiny/frontier.jsonl")
    assert end["reward"] - start["reward"] > 4 * (start["reward_se"] + end["reward_se"])
    assert end["win_rate_vs_sft"] > 0.7


def hh_rows():
    """Dialogues in HH's form; the last row's chosen and rejected do not share their prompt."""
    rows = []
    for i in range(60):
        start = f"\n\nHuman: Name a number.\n\nAssistant: Which?\n\nHuman: The one after {i}.\n\nAssistant:"
        rows.append({"chosen": f"{start} It is {i + 1}.", "rejected": f"{start} No."})
    return [
        *rows,
        {
            "chosen": "\n\nHuman: Hi.\n\nAssistant: Hi.",
            "rejected": "\n\nHuman: Ho.\n\nAssistant: Ho.",
        },
    ]


def test_three_stages_find_each_other_on_a_file_of_dialogues(tmp_path):
    """A folder model that is not tiny, a compressed file without a held-out split, three commands in a row."""
    base = tmp_path / "models/small"
    for source in ("sft", "init"):  # the weights of one, so that nothing is learned from nothing
        for file in (ROOT / "tiny" / source).iterdir():
            base.mkdir(parents=True, exist_ok=True)
            (base / file.name).write_bytes(file.read_bytes())
    with gzip.open(tmp_path / "numbers.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in hh_rows())
    flags = ["--model", "models/small", "--dataset", "numbers.jsonl.gz"]

    run(
        "sft", *flags, "--data-epochs", 4, "--learning-rate", 1e-3, cwd=tmp_path
    )  # all chosen responses
    rows = [row for row in lines(tmp_path / "runs/sft/numbers/small/evaluations.jsonl")]
    assert rows[-1]["sft/eval_loss"] < 0.8 * rows[0]["sft/eval_loss"]

    said = run("reward_model", *flags, "--data-epochs", 8, "--learning-rate", 1e-3, cwd=tmp_path)
    assert "runs/sft/numbers/small/model" in said
    assert "1 dropped: empty prompt or response, or no prompt in common" in said
    rows = [row for row in lines(tmp_path / "runs/reward_model/numbers/small/evaluations.jsonl")]
    assert rows[-1]["rm/eval_accuracy"] == 1
    saved = tmp_path / "runs/reward_model/numbers/small/model"
    assert AutoModelForSequenceClassification.from_pretrained(saved).config.num_labels == 1

    said = run("p3o_v2", *flags, *SMALL, cwd=tmp_path)
    assert (
        "runs/sft/numbers/small/model" in said and "runs/reward_model/numbers/small/model" in said
    )
    record = json.loads((tmp_path / "runs/p3o_v2/numbers/small/args.json").read_text())
    assert record["base_name"] == "small"


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--model", "no/such-folder"], "--model no/such-folder: no model is there"),
        (["--dataset", "nothing.jsonl"], "--dataset nothing.jsonl: no dataset is there"),
        (["--reward-fn", "nothing.py:f"], "expected FILE.py:FUNCTION"),
        (
            ["--dataset", "other.jsonl"],
            "expected text or messages in chosen; found None (columns: question",
        ),
        (["--max-prompt-tokens", 1], "no train prompts are left"),
        (["--output-dir", "."], "holds files already"),
        (["--num-responses", 1], "--num-responses 1: P3O compares"),
    ],
)
def test_mistakes_are_told_in_one_sentence(options, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "other.jsonl").write_text('{"question": "What?"}\n')
    said = run("p3o_v2", *options, "--num-updates", 1, cwd=tmp_path, code=2)
    assert sentence in said
    assert [path.name for path in tmp_path.iterdir()] == ["other.jsonl"]


def test_a_run_is_not_overwritten_unasked(p3o_run):
    before = (p3o_run / "metrics.jsonl").read_bytes()
    said = run("p3o_v2", *SMALL, "--beta", 1, "--output-dir", p3o_run, cwd=p3o_run, code=2)
    assert "is of a run with beta 0.2 (now 1.0)" in said
    assert (p3o_run / "metrics.jsonl").read_bytes() == before


def test_help_is_a_page_with_every_flag():
    done = subprocess.run(
        [sys.executable, ROOT / "p3o_v2.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--clip-range" in done.stdout and "Traceback" not in done.stderr
