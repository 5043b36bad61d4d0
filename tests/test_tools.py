"""What the scripts leave to other tools, adapters and trackers among them, and the first contact with the hub."""

import json

import pytest
import torch
from conftest import ROOT, run
from peft import AutoPeftModelForCausalLM
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import dpo
import p3o_v1

QUICK = "--num-updates 2 --prompts-per-update 4 --minibatch-size 4 --num-epochs 1 --max-response-tokens 8 "
QUICK = (QUICK + "--eval-every 0 --eval-prompts 4 --output-dir run").split()
OFFLINE = "--num-updates 2 --minibatch-size 4 --max-response-tokens 8 --eval-prompts 4 --output-dir run".split()
PAIRS = "".join((ROOT / "tiny/data/train.jsonl").read_text().splitlines(keepends=True)[:60])
IDS = (
    [torch.tensor([5, 6, 7]), torch.tensor([8, 9])],
    [torch.tensor([10, 11, 0]), torch.tensor([12])],
)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------- adapters
class Seen(Exception):
    pass


@pytest.mark.parametrize("flags", [{"lora_rank": 4}, {"unfrozen_layers": 2}])
def test_the_reference_shares_what_is_frozen(flags, tmp_path, monkeypatch):
    """So there is no second copy of the weights: with factors it is the policy without them."""

    def evaluate(policy, reference, *others):
        of_policy = {k.replace(".base_layer", ""): w for k, w in policy.named_parameters()}
        shared = {
            k: of_policy[k].data_ptr() == w.data_ptr() for k, w in reference.named_parameters()
        }
        assert shared == {k: not of_policy[k].requires_grad for k in shared} and any(
            shared.values()
        )
        raise Seen

    monkeypatch.setattr(p3o_v1, "evaluate", evaluate)
    with pytest.raises(Seen):
        p3o_v1.main(
            p3o_v1.Args(
                output_dir=str(tmp_path / "run"), eval_prompts=2, max_response_tokens=4, **flags
            )
        )


@pytest.mark.parametrize("script, flags", [("p3o_v1", QUICK)])
def test_an_adapter_is_saved_merged_and_refused_unmerged(script, flags, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    flags = [*flags, "--dataset", "pairs.jsonl"]
    run(script, *flags, "--lora-rank", 4, "--learning-rate", 1e-2, cwd=tmp_path)
    folder, points = tmp_path / "run/model", lines(tmp_path / "run/frontier.jsonl")
    assert (folder / "adapter_model.safetensors").stat().st_size < (
        ROOT / "tiny/sft/model.safetensors"
    ).stat().st_size
    assert not (folder / "model.safetensors").exists()
    assert points[0]["kl"] == 0 and points[-1]["kl"] > 1e-4
    found = AutoModelForCausalLM.from_pretrained(folder)(IDS[0][0][None]).logits
    merged = AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()
    assert torch.allclose(merged(IDS[0][0][None]).logits, found, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "merged")
    start = ["--reward-model", ROOT / "tiny/reward_model", "--overwrite", "--model"]
    assert "it is an adapter; merge it" in run(script, *flags, *start, folder, cwd=tmp_path, code=2)
    run(script, *flags, *start, "merged", cwd=tmp_path)


# ------------------------------------------------------------------------------------------------- a look at the data
@pytest.mark.parametrize("script, parts", [("p3o_v1", 1), ("dpo", 3)])
def test_a_dry_run_shows_rows_and_leaves_nothing(script, parts, tmp_path):
    said = run(script, "--dry-run", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert said.count("\033[90m\\n|\\n|Human|:|") == 2  # prompts, grey
    shown = [
        row for row in said.splitlines() if row.startswith("\033[32m")
    ]  # responses, green, each with its end
    assert len(shown) == 2 * (parts - 1) and all(
        row.endswith("|<|endoftext|>\033[0m") for row in shown
    )
    assert said.count("tokens: shortest, 5 %, median, 95 %, longest") == parts
    assert "GiB for weights, gradients and AdamW" in said


# ------------------------------------------------------------------------------------------------------- more ends
STOPS = [("",), ("e.", " is"), ("e",), ("|", "me a")]  # not the text of an end itself


@pytest.mark.parametrize("stop", STOPS)
def test_a_response_ends_with_the_token_that_completes_a_stop_string(stop):
    """What is sampled until then is the same, in whatever batch; what is read of it is the text before, and an end."""
    tokenizer = AutoTokenizer.from_pretrained(f"{p3o_v1.TINY}/sft")
    policy = AutoModelForCausalLM.from_pretrained(f"{p3o_v1.TINY}/sft").eval()
    prompts = [
        torch.tensor(tokenizer(f"\n\nHuman: {x}\n\nAssistant:").input_ids)
        for x in ("Hi", "How do I feed a cat?")
    ]
    noise = torch.rand(16, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    end, ended = tokenizer.eos_token_id, 0
    whole = p3o_v1.sample_responses(policy, prompts, noise, 1.0, [end])
    found = p3o_v1.sample_responses(policy, prompts, noise, 1.0, [end], tokenizer, stop)
    for (y, p, answer), (z, q, _) in zip(found, whole):
        texts = [tokenizer.decode(z[:n], skip_special_tokens=True) for n in range(len(z) + 1)]
        n = next((n for n, text in enumerate(texts) if any(x in text for x in stop if x)), len(z))
        assert torch.equal(y, z[:n]) and torch.allclose(p, q[:n], atol=1e-5)
        before = min((texts[n].partition(x)[0] for x in stop if x), key=len, default=texts[n])
        if before == texts[n]:
            assert torch.equal(answer, y)
        else:
            ended += 1
            assert tokenizer.decode(answer[:-1]) == before and answer[-1] == end
            kept = max(
                k for k in range(n + 1) if before.startswith(texts[k])
            )  # its tokens, as they were sampled
            assert torch.equal(answer[:kept], y[:kept])
    assert ended > 4 if {"the ", " is", "e"} & {*stop} else ended < 4
    if ended > 4:
        (alone,) = p3o_v1.sample_responses(
            policy, prompts[1:], noise[11:12], 1.0, [end], tokenizer, stop
        )
        assert torch.equal(alone[0], found[11][0]) and torch.equal(alone[2], found[11][2])


def test_the_limit_is_of_answers(tmp_path):
    code = "def f(xs, ys):\n    assert not any('o' in y for y in ys)\n    return [len(y) for y in ys]\n"
    (tmp_path / "r.py").write_text(code)
    flags = "--reward-fn r.py:f --num-samples 32 --eval-prompts 2 --max-response-tokens 12 --output-dir limit".split()
    run("evaluate", "limit", *flags, "--stop", "o", cwd=tmp_path)
    assert "with stop ['o'] (now ['a'])" in run(
        "evaluate", "limit", *flags, "--stop", "a", cwd=tmp_path, code=2
    )


def test_the_stop_string_of_hh():
    args = [
        p3o_v1.Args(model="nowhere", dataset=name, device="cpu")
        for name in ("", "hh", "tldr", "tiny")
    ]
    args.append(p3o_v1.Args(model="nowhere", dataset="hh", device="cpu", stop=("",)))  # none
    for each in args:
        p3o_v1.set_up(each)
    assert [each.stop for each in args] == [("\n\nHuman:",), ("\n\nHuman:",), (), (), ("",)]


# -------------------------------------------------------------------------------------------------------------- the hub
@pytest.mark.parametrize("size", ["1b", "2.8b-deduped"])
def test_public_models_are_taken_where_no_run_is(size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, name = f"EleutherAI/pythia-{size}", size.split("-")[0]
    assert dpo.find_stage("sft", model, "tldr") == f"trl-lib/pythia-{name}-deduped-tldr-sft"
    expected = f"cleanrl/EleutherAI_pythia-{name}-deduped__reward__tldr"
    assert dpo.find_stage("reward_model", model, "tldr") == expected
    for stage, other, dataset in [
        ("sft", model, "hh"),
        ("sft", "gpt2", "tldr"),
        ("sft", "EleutherAI/pythia-14m", "tldr"),
    ]:
        assert dpo.find_stage(stage, other, dataset) is None
    recipes = (ROOT / "docs/recipes.md").read_text()
    assert all(public.format("1b") in recipes for public in dpo.PUBLIC.values())


def test_summaries_of_news_are_no_tldr(tmp_path):
    """The validation rows of that dataset hold articles of CNN/DM too."""
    folder = tmp_path / "trl-lib/tldr-preference"  # in place of the hub's
    folder.mkdir(parents=True)
    post = "SUBREDDIT: r/{}\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"
    for name, start in (("train", 0), ("validation", 100)):
        rows = [
            {"prompt": post.format(start + i), "chosen": " Yes.", "rejected": " No."}
            for i in range(8)
        ]
        rows += [
            {"prompt": f"TITLE: {name}\n\nNews.\n\nTL;DR:", "chosen": " A.", "rejected": " B."}
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", ROOT / "tiny/sft", "--dataset", "tldr", *OFFLINE]
    said = run("dpo", *flags, cwd=tmp_path)
    assert (
        "2 rows dropped: of CNN/DM, no Reddit posts" in said
        and "8 train rows" in said
        and "8 held-out rows" in said
    )


def test_models_as_they_lie_on_the_hub(tmp_path):
    """16-bit weights, no padding token, a generation_config without the end of a text; a reward model with one label
    named LABEL_0 and a padding token more in its tokenizer than in its config."""
    policy = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/sft").to(torch.bfloat16)
    judge = AutoModelForSequenceClassification.from_pretrained(ROOT / "tiny/reward_model")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/sft")
    policy.config.pad_token_id = judge.config.pad_token_id = (
        policy.generation_config.pad_token_id
    ) = None
    policy.generation_config.eos_token_id = policy.generation_config.bos_token_id = None
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    judge.resize_token_embeddings(800)  # a multiple of something, as there
    judge.config.id2label = {0: "LABEL_0"}
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    for name, absent in (
        ("policy/config", "pad_token_id"),
        ("policy/generation_config", "eos_token_id"),
    ):
        file = tmp_path / f"{name}.json"
        file.write_text(
            json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != absent})
        )
    models = ["--model", "policy", "--reward-model", "judge", "--dataset", "tiny"]
    run("p3o_v1", *QUICK, *models, cwd=tmp_path)
    point = lines(tmp_path / "run/frontier.jsonl")[0]
    assert point["kl"] == 0 and abs(point["reward"]) < 10
    assert max(row["val/ratio_init_error"] for row in lines(tmp_path / "run/metrics.jsonl")) < 1e-3
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert saved.dtype == torch.float32  # not rounded again
