"""The scripts as their users run them: subprocesses with small sizes, on the tiny world and on local folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run
from transformers import AutoModelForCausalLM, AutoTokenizer

import p3o_v1

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
    run("p3o_v1", *SMALL, cwd=folder)
    return folder / "runs/p3o_v1/tiny/tiny"


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


def test_same_seed_same_numbers(p3o_run, tmp_path):
    run("p3o_v1", *SMALL, "--output-dir", "again", cwd=tmp_path)
    for name in ("metrics.jsonl", "frontier.jsonl", "samples.jsonl"):
        first, again = (without_times(lines(f / name)) for f in (p3o_run, tmp_path / "again"))
        assert first == again


LEAN = ["--dtype", "bfloat16", "--gradient-checkpointing", "--unfrozen-layers", 2]


@pytest.mark.parametrize("options", [["--clip-range", 0], LEAN])
def test_variants_run(options, tmp_path):
    run("p3o_v1", *SMALL, *options, cwd=tmp_path)
    rows = lines(tmp_path / "runs/p3o_v1/tiny/tiny/metrics.jsonl")
    assert all(abs(value) < 1e6 for row in rows for value in row.values())
    if options[0] == "--clip-range":
        assert all(row["policy/clipfrac"] == 0 for row in rows)


def test_stages_of_the_second_plan_are_found(tmp_path):
    """sft.py and reward_model.py on a file of dialogues and a folder model; p3o_v1.py and evaluate.py take up theirs."""
    base = tmp_path / "models/small"
    shutil.copytree(ROOT / "tiny/sft", base)
    start = (
        "\n\nHuman: Name a number.\n\nAssistant: Which?\n\nHuman: The one after {}.\n\nAssistant:"
    )
    starts = [start.format(i) for i in range(60)]
    rows = [{"chosen": f"{x} It is {i}.", "rejected": f"{x} No."} for i, x in enumerate(starts)]
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", "models/small", "--dataset", "numbers.jsonl"]
    first = [*flags, "--num-updates", 2, "--minibatch-size", 8, "--eval-prompts", 4]
    run("sft", *first, cwd=tmp_path)
    run("reward_model", *first, cwd=tmp_path)
    found = [f"runs/{stage}/numbers.jsonl/small/model" for stage in ("sft", "reward_model")]
    said = run("p3o_v1", *flags, *SMALL, "--num-updates", 1, cwd=tmp_path)
    assert found[0] in said and found[1] in said
    record = json.loads((tmp_path / "runs/p3o_v1/numbers/small/args.json").read_text())
    assert (record["base_name"], record["policy"], record["reward"]) == ("small", *found)
    run(
        "dpo",
        "--model",
        found[0],
        *flags[2:],
        "--num-updates",
        1,
        "--eval-prompts",
        2,
        cwd=tmp_path,
    )
    assert (
        tmp_path / "runs/dpo/numbers/small/model"
    ).is_dir()  # named after the model at the beginning
    sizes = ["--num-samples", 32, "--eval-prompts", 2, "--max-response-tokens", 8]
    run("evaluate", "limit", *flags, *sizes, cwd=tmp_path)
    limit = json.loads((tmp_path / "runs/limit/numbers/small/limit.json").read_text())
    assert (limit["base_name"], limit["policy"], limit["reward"]) == ("small", *found)


def test_a_stage_of_another_start_is_not_taken(tmp_path, monkeypatch):
    """The SFT policy's --model, and the --dataset of both, must be the ones that are asked for."""
    monkeypatch.chdir(tmp_path)
    for stage, model in (("sft", "pythia-1b"), ("reward_model", "other/pythia-1b")):
        folder = tmp_path / "runs" / stage / "rows.jsonl/pythia-1b"
        (folder / "model").mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps({"model": model, "dataset": "rows.jsonl"}))
    asked = [("EleutherAI/pythia-1b", "rows.jsonl"), ("your/pythia-1b", "rows.jsonl")]
    asked += [("EleutherAI/pythia-1b", "my/rows.jsonl")]
    found = [p3o_v1.find_stage(stage, *x) for stage in ("sft", "reward_model") for x in asked]
    sft, scorer = (f"runs/{x}/rows.jsonl/pythia-1b/model" for x in ("sft", "reward_model"))
    assert found == [sft, None, None, scorer, scorer, None]
