"""The built-in world, and every script as its users run it: what runs leave, what settings do."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import EVALUATIONS, EVERY, ONLINE, SCORED, SHORT, build, events_of, save, tiny_rows
from safetensors.torch import load_file
from scripts import ROOT, TINY, assert_same, lines, run, write_reward, write_rows, write_splits
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import dpo
import p3o_v2

sys.path.insert(0, str(TINY))
import data as tiny_data  # noqa: E402
import gold  # noqa: E402
import grammar  # noqa: E402


# ------------------------------------------------------------------------------ the built-in world
def test_the_data_are_what_make_writes_and_no_prompt_is_in_both_splits(tmp_path):
    tiny_data.write_data(tmp_path, 0)
    prompts = []
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (TINY / "data" / name).read_bytes()
        prompts.append({row["prompt"] for row in lines(tmp_path / name)})
    assert len(prompts[1]) >= 300 and not prompts[0] & prompts[1]


def test_the_true_reward_wants_what_its_docstring_says():
    """Each answer is better than the next, and any text has a bounded reward."""
    tea, steps = "\n\nHuman: How do I make tea?\n\nAssistant:", grammar.TOPICS["make tea"]
    answers = [
        f" Happy to help! {steps[0]} {steps[1]} Hope that helps!",
        f" Happy to help! {steps[0]} {steps[1]}",
        f" Okay. {steps[0]} {steps[1]}",
        f" Okay. {steps[1]} {steps[0]}",
        f" Okay. {steps[1]} {steps[0]} Now go away.",
        f" Not this again. {steps[1]} {steps[0]} Now go away.",
        " Happy to help! Happy to help! Hope that helps! Hope that helps!",
        f" Not this again. {grammar.SMALL_TALK[0]} {grammar.SMALL_TALK[0]} Now go away.",
        "",
    ]
    values = gold.gold_reward([tea] * len(answers), answers)
    assert values == sorted(values, reverse=True) and len(set(values)) == len(values)
    texts = ["", " ", "a" * 10_000, "\n\nHuman:", ". ! ?", " Okay." * 100, "émoji 🍵"]
    assert all(gold.EMPTY <= value < 20 for value in gold.gold_reward([tea] * len(texts), texts))


def test_the_models_of_the_world_are_as_good_as_promised():
    """The policy speaks the grammar; the reward model predicts labels nearly as the truth does."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "sft")
    rows = lines(TINY / "data/test.jsonl")
    prompts = dpo.encode_prompts(tokenizer, [row["prompt"] for row in rows])
    pairs = [[row["chosen"], row["rejected"]] for row in rows]
    pairs = [dpo.encode_responses(tokenizer, texts, [0], 128, Counter()) for texts in pairs]
    args = dpo.Args(dataset="tiny", dtype="float32", micro_batch_size=200)
    policy = dpo.load_model(AutoModelForCausalLM, str(TINY / "sft"), "cpu", args)
    rewards = dpo.load_rewards(str(TINY / "reward_model"), tokenizer, "cpu", args)
    noise = torch.rand(200, 4, 128, generator=torch.Generator().manual_seed(0)).double()
    accuracy = {}
    with torch.no_grad():
        for name, function in rewards.items():
            accuracy[name] = 0.5 - function(prompts, pairs).diff(dim=1).sign().mean() / 2
        found = p3o_v2.sample_responses(policy, prompts[:200], noise, 1.0, [0])
    assert len(rows) == 2000 and accuracy["reward"] >= accuracy["gold"] - 0.02
    answers = [responses for responses, _ in found]
    assert rewards["gold"](prompts[:200], answers).var(1).mean().sqrt() >= 1
    texts = [row["response"] for row in dpo.decode_texts(tokenizer, prompts, answers)]
    assert sum(grammar.parse(text) is not None for text in texts) >= 0.95 * 800
    assert not any(grammar.parse(text) for text in ("", "Okay.", " Okay", " Okay. Okay.", " x"))


# ---------------------------------------------------------------------------- what a run leaves
def changed(start, end):
    """Names of the weights in which two saved models differ, but for rounding to bfloat16."""
    start, end = (load_file(folder / "model.safetensors") for folder in (start, end))
    return {name for name in start if not torch.equal(start[name].to(end[name].dtype), end[name])}


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
    kind = AutoModelForCausalLM if script != "reward_model" else AutoModelForSequenceClassification
    _, info = kind.from_pretrained(folder / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(folder / "model").eos_token_id == 0
    if script != "sft":  # which starts at random here
        same = load_file(TINY / "sft/model.safetensors").keys()
        same -= changed(TINY / "sft", folder / "model")
        assert same <= {"gpt_neox.final_layer_norm.bias"}  # no difference of scores depends on it


@pytest.mark.parametrize("script", SCORED)
def test_a_policy_leaves_the_reference_and_shows_held_out_answers(script, finished, data):
    start, *_, end = lines(finished(script) / "frontier.jsonl")
    assert start["kl"] == 0 and start["win_rate_vs_sft"] == 0.5 and end["kl"] != 0
    first, *others = lines(finished(script) / "metrics.jsonl")
    if script in ONLINE:
        assert abs(start["kl_k1"]) < 1e-5 and end["kl"] > 0 and abs(first["objective/kl"]) < 1e-5
        assert all(row["val/ratio_init_error"] < 1e-4 for row in (first, *others))
    else:
        assert start["accuracy"] == 0.5 and abs(first["rewards/margins"]) < 1e-4
    rows = lines(finished(script) / "samples.jsonl")
    assert [row["step"] for row in rows] == [0] * 4 + [2] * 4 + [3] * 4
    held_out = {row["prompt"] for row in lines(data / "test.jsonl")}
    assert {row["prompt"] for row in rows} <= held_out
    assert len({row["prompt"] for row in rows[:4]}) == 4
    assert all(row["response"] == row["sft_response"] for row in rows[:4])


@pytest.mark.parametrize("script", EVERY)
def test_a_script_learns_in_a_few_updates(script, tmp_path):
    """To answer briefly, or what is held out as well, so that a few steps suffice."""
    rows = tiny_rows("train", 24)
    others = [{**row, "prompt": row["prompt"] + " "} for row in rows]
    write_splits(tmp_path / "data", rows, others)
    options = "--eval-every 0 --learning-rate 3e-3 --dataset data --output-dir run".split()
    if script in ONLINE:
        options += "--num-updates 6 --prompts-per-update 8 --minibatch-size 4".split()
        options += ["--num-epochs", 1, "--max-response-tokens", 12]
        options += write_reward(tmp_path, "[-len(y) / 10 for y in responses]")
    else:
        options += "--num-updates 8 --minibatch-size 8 --max-response-tokens 16".split()
    options += ["--lam", 1] if script == "ppo" else []
    run(script, *options, cwd=tmp_path)
    start, end = lines(tmp_path / f"run/{EVALUATIONS[script]}.jsonl")
    assert script not in SCORED or end["win_rate_vs_sft"] > 0.5
    if script in ONLINE:
        assert end["reward"] - start["reward"] > 3 * (start["reward_se"] + end["reward_se"])
    elif script == "sft":
        assert end["sft/eval_loss"] < start["sft/eval_loss"] - 1
    else:
        key = "rm/eval_accuracy" if script == "reward_model" else "accuracy"
        assert end[key] > 0.9 > start[key]


# ------------------------------------------------------------------------------ memory, precision
@pytest.mark.parametrize("script", EVERY)
def test_checkpointing_and_micro_batches_change_rounding_only(script, flags, finished, tmp_path):
    more = ["--gradient-checkpointing", "--micro-batch-size", 1, "--num-updates", 1]
    run(script, *flags[script], *more, cwd=tmp_path)
    found = lines(tmp_path / "run/metrics.jsonl")
    expected = lines(finished(script) / "metrics.jsonl")[:1]
    of_a_part = r"lr|val/.*|policy/(ratio_max|.*_std)|value/(clip|explained).*"
    if script == "mpo":  # as many samples of the reference are drawn at a time
        of_a_part += "|policy/(loss|ref_sample_logps)|grad_norm"
    assert_same(found, expected, of_a_part, rel=1e-3, abs=1e-4)


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
        key = {"mpo": "policy/preference", "reward_model": "rm/loss"}.get(script, "policy/loss")
        expected = lines(finished(script) / "metrics.jsonl")[0][key]
        assert row[key] == pytest.approx(expected, rel=0.05, abs=0.02)
    names = changed(TINY / "sft", tmp_path / "run/model")  # its head is its embedding
    assert names == {name for name in names if ".layers.3." in name} != set()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").dtype == torch.float32


# ------------------------------------------------------------------------ models and data forms
@pytest.mark.parametrize("script", EVERY)
def test_learned_positions_are_used_to_the_last_and_never_beyond(script, tmp_path):
    """64 of them: 16 for the response, 48 for the prompt. A prompt of 49 tokens is dropped. One is
    held out: there is no standard error then, but what is logged is JSON."""
    save(build("gpt2", "policy", seed=1, vocab_size=768), tmp_path / "gpt2")
    answers = {"completion": " Wash it." * 9, "chosen": " Wash." * 12, "rejected": " No."}
    tokens = enumerate([48, 48, 48, 9, 47, 48, 49])
    rows = [{"prompt": f"{i}" + " the" * (n - 1), **answers} for i, n in tokens]
    write_splits(tmp_path / "data", rows[1:], rows[:1])
    options = [*SHORT[script], "--num-updates", 2, "--max-response-tokens", 16, "--model", "gpt2"]
    if script in ONLINE:
        options += [*write_reward(tmp_path), "--missing-eos-penalty", 1]
    if script == "ppo":
        options += ["--num-responses", 1]  # which the others cannot compare with another
    said = run(script, *options, "--dataset", "data", "--output-dir", "run", cwd=tmp_path)
    assert re.search("training +5 .* 48 tokens", said)  # 5 of 6 are kept
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 2
    evaluations = lines(tmp_path / f"run/{EVALUATIONS[script]}.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2]


@pytest.mark.parametrize("script", ONLINE)
def test_a_model_whose_training_ignores_its_window_is_refused(script, data, tmp_path):
    """Sampling forgets what is outside, training does not."""
    save(build("mistral", "policy", seed=1, vocab_size=768), tmp_path / "mistral")
    options = [*SHORT[script], "--model", "mistral", *write_reward(tmp_path), "--dataset", data]
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
    for script in ("sft", "reward_model", "p3o_v2", "dpo"):
        run(script, *SHORT[script], *common, cwd=tmp_path)
        folder = tmp_path / f"runs/{script}/numbers.jsonl/small"
        record = json.loads((folder / "args.json").read_text())
        policy = "runs/sft/numbers.jsonl/small/model" if script != "sft" else "models/small"
        assert record["policy"] == policy
        assert changed(tmp_path / "models/small", folder / "model")
        if script in SCORED:
            assert record["reward"] == "runs/reward_model/numbers.jsonl/small/model"
            samples = lines(folder / "samples.jsonl")
            assert all(row["prompt"].endswith("+ 1\n\nAssistant:") for row in samples)


def test_track_logs_to_weights_and_biases_without_a_network(data, tmp_path):
    """In a process of its own: W&B ends its run when the interpreter exits."""
    options = [*SHORT["p3o_v2"], "--dataset", data, "--num-updates", 1, "--track"]
    command = [sys.executable, ROOT / "p3o_v2.py", *map(str, options)]
    environment = {**os.environ, "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"objective/reward" in kept.read_bytes() and b"prompts_per_update" in kept.read_bytes()
