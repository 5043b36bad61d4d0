"""Every script as its users run it, with small sizes: what a run leaves, and what settings do."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import (
    EVALUATIONS,
    EVERY,
    LOSS,
    OFFLINE,
    ONLINE,
    ROOT,
    SHORT,
    STAGES,
    TINY,
    Script,
    build,
    events_of,
    lines,
    run,
    save,
    tiny_rows,
    without_times,
    write_rows,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

SCORED = (*ONLINE, *OFFLINE)  # they start at the SFT policy, and evaluate by rewards
GIVEN = ["--reward-fn", "reward.py:f"]


def write_reward(folder, result="range(len(prompts))"):
    (folder / "reward.py").write_text(f"def f(prompts, responses):\n    return {result}\n")


def changed(start, end):
    """Names of the weights in which two saved models differ, but for rounding to bfloat16."""
    start, end = (load_file(folder / "model.safetensors") for folder in (start, end))
    return {name for name in start if not torch.equal(start[name].to(end[name].dtype), end[name])}


# ---------------------------------------------------------------------------- what a run leaves
@pytest.mark.parametrize("script", EVERY)
def test_a_run_leaves_its_settings_logs_and_a_model(script, finished):
    folder = finished(script)
    record = json.loads((folder / "args.json").read_text())
    assert record["script"] == script and record["seed"] == 1 and record["num_updates"] == 3
    metrics = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    evaluations = lines(folder / f"{EVALUATIONS[script]}.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    if script not in ONLINE:  # a cosine
        factors = [row["lr"] / metrics[0]["lr"] for row in metrics]
        assert factors == pytest.approx([1, 0.75, 0.25])
    events = events_of(folder)
    for key in metrics[0].keys() - {"step"}:
        assert [event.step for event in events.Scalars(key)] == [1, 2, 3]
        found = [event.value for event in events.Scalars(key)]
        assert found == pytest.approx([row[key] for row in metrics], rel=1e-5, abs=1e-30)
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-000003.pt"]
    kind = AutoModelForCausalLM
    if script == "reward_model":
        kind = AutoModelForSequenceClassification
    model, info = kind.from_pretrained(folder / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(folder / "model").eos_token_id == 0
    if script != "sft":  # which starts at random here
        same = load_file(TINY / "sft/model.safetensors").keys() - changed(
            TINY / "sft", folder / "model"
        )
        assert same <= {"gpt_neox.final_layer_norm.bias"}  # no difference of scores depends on it


@pytest.mark.parametrize("script", EVERY)
def test_every_key_that_is_logged_is_explained(script, finished):
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    explained = {key for row in table for key in re.findall(r"`([\w/]+)`", row)}
    for name in ("metrics", EVALUATIONS[script]):
        row = lines(finished(script) / f"{name}.jsonl")[-1]
        logged = {re.sub(r"_decile_\d", "_decile_0", key.removesuffix("_se")) for key in row}
        assert logged - explained == {"step"}


@pytest.mark.parametrize("script", SCORED)
def test_a_policy_starts_at_the_reference_and_leaves_it(script, finished):
    start, *_, end = lines(finished(script) / "frontier.jsonl")
    assert start["kl"] == 0 and start["win_rate_vs_sft"] == 0.5 and end["kl"] != 0
    first, *others = lines(finished(script) / "metrics.jsonl")
    if script in ONLINE:
        assert abs(start["kl_k1"]) < 1e-5 and end["kl"] > 0 and abs(first["objective/kl"]) < 1e-5
        assert all(row["val/ratio_init_error"] < 1e-4 for row in (first, *others))
    else:
        assert start["accuracy"] == 0.5 and abs(first["rewards/margins"]) < 1e-4


@pytest.mark.parametrize("script", SCORED)
def test_samples_are_a_table_of_held_out_answers(script, finished, data):
    rows = lines(finished(script) / "samples.jsonl")
    assert [row["step"] for row in rows] == [0] * 4 + [2] * 4 + [3] * 4
    held_out = {row["prompt"] for row in lines(data / "test.jsonl")}
    assert {row["prompt"] for row in rows} <= held_out
    assert len({row["prompt"] for row in rows[:4]}) == 4
    assert all(row["response"] == row["sft_response"] for row in rows[:4])


@pytest.mark.parametrize("script", ONLINE)
def test_online_scripts_learn_in_a_few_updates(script, tmp_path):
    """A reward that a few steps can reach: short responses."""
    write_reward(tmp_path, "[-len(y) / 10 for y in responses]")
    options = "--num-updates 6 --prompts-per-update 8 --minibatch-size 4 --num-epochs 1"
    options += " --eval-prompts 32 --learning-rate 3e-3 --max-response-tokens 12 --eval-every 0"
    if script == "ppo":
        options += " --lam 1"
    run(script, *options.split(), *GIVEN, "--output-dir", "run", cwd=tmp_path)
    start, end = lines(tmp_path / "run/frontier.jsonl")
    assert end["reward"] - start["reward"] > 3 * (start["reward_se"] + end["reward_se"])


@pytest.mark.parametrize("script", (*OFFLINE, *STAGES))
def test_other_scripts_learn_in_a_few_updates(script, tmp_path):
    """What is held out is like what they learn from, so that a few steps suffice."""
    write_rows(tmp_path / "data/train.jsonl", tiny_rows("train", 24))
    rows = [{**row, "prompt": f"{row['prompt']} "} for row in tiny_rows("train", 24)]
    write_rows(tmp_path / "data/test.jsonl", rows)
    options = "--num-updates 8 --minibatch-size 8 --eval-every 0 --learning-rate 3e-3"
    options += " --max-response-tokens 16 --dataset data --output-dir run"
    run(script, *options.split(), cwd=tmp_path)
    start, end = lines(tmp_path / f"run/{EVALUATIONS[script]}.jsonl")
    if script == "sft":
        assert end["sft/eval_loss"] < start["sft/eval_loss"] - 1
    else:
        key = "rm/eval_accuracy" if script == "reward_model" else "accuracy"
        assert end[key] > 0.9 > start[key]


# ------------------------------------------------------------------------------ memory, precision
@pytest.mark.parametrize("script", EVERY)
def test_checkpointing_and_micro_batches_change_rounding_only(script, flags, finished, tmp_path):
    more = ["--gradient-checkpointing", "--micro-batch-size", 1, "--num-updates", 1]
    run(script, *flags[script], *more, cwd=tmp_path)
    [found] = without_times(lines(tmp_path / "run/metrics.jsonl"))
    expected = lines(finished(script) / "metrics.jsonl")[0]
    of_a_part = r"lr|val/.*|policy/(ratio_max|.*_std)|value/(clip|explained).*"
    if script == "mpo":  # as many samples of the reference are drawn at a time
        of_a_part += "|policy/(loss|ref_sample_logps)|grad_norm"
    for key in found:
        if not re.fullmatch(of_a_part, key):
            assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("script", EVERY)
def test_bfloat16_starts_at_the_reference_to_the_bit(script, flags, finished, tmp_path):
    """And changes little. Where the last layer alone is trained, it alone changes."""
    more = ["--dtype", "bfloat16", "--unfrozen-layers", 1, "--num-updates", 1]
    if script in ONLINE:
        more += ["--num-epochs", 1, "--minibatch-size", 4]
    if script == "sft":
        more += ["--model", TINY / "sft"]  # tiny starts at random
    run(script, *flags[script], *more, cwd=tmp_path)
    [row] = lines(tmp_path / "run/metrics.jsonl")
    if script in SCORED:
        start, end = lines(tmp_path / "run/frontier.jsonl")
        assert start["kl"] == 0 != end["kl"]
    if script in ONLINE:
        assert row["val/ratio_init_error"] < 0.5 and row.get("policy/ratio_max", 1) == 1
        assert row["objective/kl"] == 0 or script == "online_dpo"  # which asks the sampler
    elif script != "sft":
        key = "policy/preference" if script == "mpo" else LOSS[script]
        expected = lines(finished(script) / "metrics.jsonl")[0][key]
        assert row[key] == pytest.approx(expected, rel=0.05, abs=0.02)
    names = changed(TINY / "sft", tmp_path / "run/model")  # its head is its embedding
    assert names == {name for name in names if ".layers.3." in name} != set()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").dtype == torch.float32


def test_only_the_last_layer_and_an_untied_head_change(data, tmp_path):
    save(build("gpt_neox", "policy", seed=1, vocab_size=768), tmp_path / "untied")
    write_reward(tmp_path)
    options = [*SHORT["p3o_v2"], "--model", "untied", *GIVEN, "--dataset", data]
    options += ["--unfrozen-layers", 1, "--num-updates", 1, "--output-dir", "run"]
    run("p3o_v2", *options, cwd=tmp_path)
    names = load_file(tmp_path / "untied/model.safetensors").keys()
    expected = {name for name in names if ".layers.1." in name or "embed_out" in name}
    assert changed(tmp_path / "untied", tmp_path / "run/model") == expected != set()


# ------------------------------------------------------------------------ models and data forms
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
    """64 of them: 16 for the response, 48 for the prompt; one prompt more is too long.

    One prompt is held out: there is no standard error then, but what is logged is JSON.
    """
    save(build("gpt2", "policy", seed=1, vocab_size=768), tmp_path / "gpt2")
    write_reward(tmp_path)
    rows = []
    for number, length in enumerate([48, 48, 48, 9, 47, 48, 49]):
        answers = {"completion": " Wash it." * 9, "chosen": " Wash." * 12, "rejected": " No."}
        rows.append({"prompt": text_of(length, number), **answers})
    write_rows(tmp_path / "data/train.jsonl", rows[1:])
    write_rows(tmp_path / "data/test.jsonl", rows[:1])
    options = [*SHORT[script], "--num-updates", 2, "--max-response-tokens", 16, "--model", "gpt2"]
    if script in ONLINE:
        options += [*GIVEN, "--missing-eos-penalty", 1]
    if script == "ppo":
        options += ["--num-responses", 1]  # which the others cannot compare with another
    said = run(script, *options, "--dataset", "data", "--output-dir", "run", cwd=tmp_path)
    [counted] = [line for line in said.splitlines() if line.startswith("training")]
    if script in ONLINE:
        # Kept, rows, repeated, otherwise dropped, too long, the limit
        assert re.findall(r"\d+", counted) == ["5", "6", "0", "0", "1", "48"]
    else:
        assert "5 examples" in counted and "prompts of more than 48 tokens dropped': 1" in counted
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 2
    evaluations = lines(tmp_path / f"run/{EVALUATIONS[script]}.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2]


@pytest.mark.parametrize("script", ONLINE)
def test_a_model_whose_training_ignores_its_window_is_refused(script, data, tmp_path):
    """Sampling forgets what is outside, training does not."""
    save(build("mistral", "policy", seed=1, vocab_size=768), tmp_path / "mistral")
    write_reward(tmp_path)
    options = [*SHORT[script], "--model", "mistral", *GIVEN, "--dataset", data]
    said = run(script, *options, cwd=tmp_path, code=2)
    assert "--model mistral" in said.rpartition(f"{script}.py: ")[2]
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_stages_find_each_other_on_dialogues(tmp_path):
    """For a folder model that is not tiny, and a file in HH's form without a held-out split."""
    shutil.copytree(TINY / "sft", tmp_path / "models/small")
    rows = []
    for i in range(40):
        start = f"\n\nHuman: Name a number.\n\nAssistant: Which?\n\nHuman: {i} + 1\n\nAssistant:"
        rows.append({"chosen": f"{start} It is {i + 1}.", "rejected": f"{start} No."})
    write_rows(tmp_path / "numbers.jsonl", rows)
    common = "--model models/small --dataset numbers.jsonl --num-updates 3".split()
    records = {}
    for script in ("sft", "reward_model", "p3o_v2", "dpo"):
        run(script, *SHORT[script], *common, cwd=tmp_path)
        folder = tmp_path / f"runs/{script}/numbers.jsonl/small"
        records[script] = json.loads((folder / "args.json").read_text())
        assert changed(tmp_path / "models/small", folder / "model")
    assert records["sft"]["policy"] == "models/small"
    for script in ("reward_model", "p3o_v2", "dpo"):
        assert records[script]["policy"] == "runs/sft/numbers.jsonl/small/model"
    for script in ("p3o_v2", "dpo"):
        assert records[script]["reward"] == "runs/reward_model/numbers.jsonl/small/model"
        samples = lines(tmp_path / f"runs/{script}/numbers.jsonl/small/samples.jsonl")
        assert all(row["prompt"].endswith("+ 1\n\nAssistant:") for row in samples)
    # Another dataset has no stages before it, and the policy is --model itself.
    write_rows(tmp_path / "others.jsonl", rows)
    said = run("p3o_v2", *common, "--dataset", "others.jsonl", cwd=tmp_path, code=2)
    assert "reward_model.py" in said.rpartition("p3o_v2.py: ")[2]


@pytest.mark.parametrize("result, code", [("[0.0]", 2), ("1 / 0", 1)])
def test_a_reward_function_that_goes_wrong_ends_the_run(result, code, flags, tmp_path):
    """Wrong numbers in a sentence; an exception in a traceback into the file of its author."""
    write_reward(tmp_path, result)
    found, said = Script("p3o_v2", *flags["p3o_v2"], *GIVEN, cwd=tmp_path).wait()
    assert found == code, said
    assert ("Traceback" in said and "reward.py" in said) == (code == 1)
    assert ("p3o_v2.py: the reward function" in said) == (code == 2)


def test_weights_that_are_no_numbers_any_more_end_the_run(flags, tmp_path):
    options = [*flags["dpo"], "--learning-rate", 1e30, "--max-grad-norm", 0]
    said = run("dpo", *options, cwd=tmp_path, code=2)
    assert "--learning-rate" in said.rpartition("dpo.py: ")[2]
    found = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert found == ["checkpoint-000001.pt"]


# ------------------------------------------------------------------------------ the command line
@pytest.mark.parametrize("script", EVERY)
def test_help_tells_every_flag(script, tmp_path):
    said = run(script, "--help", cwd=tmp_path)
    for name in vars(importlib.import_module(script).Args()):
        assert f"--{name.replace('_', '-')}" in said


def test_track_logs_to_weights_and_biases_without_a_network(data, tmp_path):
    """In a process of its own: W&B ends its run when the interpreter exits."""
    options = [*SHORT["p3o_v2"], "--dataset", data, "--num-updates", 1, "--track"]
    command = [sys.executable, ROOT / "p3o_v2.py", *map(str, options)]
    environment = {**os.environ, "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"objective/reward" in kept.read_bytes() and b"prompts_per_update" in kept.read_bytes()
