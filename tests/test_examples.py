"""docs/examples: the diffs apply as they are, their scripts are right, and so is classifier.py."""

import re
import runpy
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from conftest import build, save
from scripts import ROOT, TINY, assert_same, lines, run, run_two, write_reward
from tokenizers import processors
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo

DIFFS = sorted((ROOT / "docs/examples").glob("*.diff"))
SMALL = "--prompts-per-update 8 --minibatch-size 4 --num-epochs 1 --eval-prompts 8".split()
SMALL += ["--max-response-tokens", 16, "--output-dir", "run"]
REWARDS = {"reward": "[1.0] * len(prompts)", "rebel": "[-len(y) for y in responses]"}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A folder with p3o_v2.py, grpo.py and a changed copy for each diff, named as the diff is."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "tiny").symlink_to(TINY)
    for diff in DIFFS:
        name = diff.read_text().split(maxsplit=2)[1]
        assert diff.read_text().startswith(f"--- {name}\n+++ {name}\n")
        shutil.copy(ROOT / name, folder)
        mine = shutil.copy(ROOT / name, folder / f"{diff.stem}.py")
        said = subprocess.run(["patch", mine, diff], capture_output=True, text=True, check=True)
        assert said.stdout == f"patching file {mine}\n"  # else: an offset, or fuzz
    sys.path.append(str(folder))
    return folder


def test_changed_scripts_are_as_neat_as_the_originals(scripts):
    for command in ("check", "format --check"):
        ruff = [sys.executable, "-m", "ruff", *command.split(), "--no-cache"]
        ruff += ["--config", ROOT / "pyproject.toml", *scripts.glob("*.py")]
        said = subprocess.run(ruff, capture_output=True, text=True)
        assert said.returncode == 0, said.stdout


def test_the_example_of_data_reads_a_csv_file(scripts, tmp_path):
    rows = [f'"How many are {n} and, well, one?",{n + 1}' for n in range(100)]
    (tmp_path / "sums.csv").write_text("\n".join(["question,answer", *rows]))
    options = ["--dataset", "sums.csv", *write_reward(tmp_path)]
    run(scripts / "dataset.py", *SMALL, *options, "--num-updates", 1, cwd=tmp_path)
    prompts = [row["prompt"] for row in lines(tmp_path / "run/samples.jsonl")]
    questions = [f"\n\nHuman: {row[1:].split('?')[0]}?\n\nAssistant:" for row in rows]
    assert prompts and set(prompts) <= set(questions)


@pytest.mark.parametrize("name", REWARDS)
def test_answers_become_shorter_where_that_is_rewarded(name, scripts, tmp_path):
    options = "--num-updates 8 --learning-rate 3e-3 --max-response-tokens 32 --eval-prompts 32"
    options = [*options.split(), *write_reward(tmp_path, REWARDS[name])]
    options += ["--length-penalty", 0.02] if name == "reward" else []
    run(scripts / f"{name}.py", *SMALL, *options, cwd=tmp_path)
    start, end = lines(tmp_path / "run/frontier.jsonl")
    assert start["length"] - end["length"] > 3 * (start["length_se"] + end["length_se"])
    if name == "reward":
        metrics = lines(tmp_path / "run/metrics.jsonl")
        assert all(row["objective/reward"] == 1 for row in metrics)  # without the penalty


def test_rebel_fits_log_ratios_to_rewards(scripts):
    """Its loss is, but for a factor, the squared error of Δ/η: 0 where Δ = η (r_1 − r_2)."""
    old, ref, rewards, off = torch.randn(4, 5, 3, dtype=torch.float64)
    eta, loss = 5.0, import_module("rebel").pairwise_loss
    assert loss(old + eta * rewards, old, ref, rewards, 1 / eta, 0.2, 10.0)[0] < 1e-20
    errors = off / eta - rewards
    errors = [errors[:, i] - errors[:, j] for i, j in ((0, 1), (0, 2), (1, 2))]
    logps = (old + off).requires_grad_()
    value, metrics = loss(logps, old, ref, rewards, 1 / eta, 0.2, 10.0)
    assert_close(value, eta / 4 * torch.stack(errors).square().mean())
    assert not any(metric.requires_grad for metric in metrics.values())


def test_the_loss_of_dr_grpo_is_the_mean_over_responses_of_the_sums_over_tokens(scripts):
    """GRPO has means over the tokens of a response."""
    logprobs, old, ref = -torch.rand(3, 4, 3, 9, dtype=torch.float64)  # 4 prompts, 3 responses
    advantages, lengths = torch.randn(4, 3), torch.randint(1, 10, (4, 3))
    mask = torch.arange(9) < lengths[..., None]
    batch = (logprobs, old, ref, advantages, mask)
    sums = []
    for b, k in torch.cartesian_prod(torch.arange(4), torch.arange(3)):
        mean, _ = grpo.policy_loss(*(x[b, k][None] for x in batch), 0.3, 0.2)
        sums.append(mean * lengths[b, k])
    loss, _ = import_module("dr_grpo").policy_loss(*batch, 0.3, 0.2)
    assert_close(loss, torch.stack(sums).mean())


@pytest.mark.parametrize("name, factor", [("grpo", 1), ("dr_grpo", 10)])
def test_dr_grpo_does_not_divide_rewards_by_their_deviation(name, factor, scripts, tmp_path):
    """Rewards ten times as large make its first gradient ten times as large, but not GRPO's."""
    norms = []
    for scale in (1, 10):
        options = write_reward(tmp_path, f"[{scale} * len(y) for y in responses]")
        options += ["--beta", 0, "--num-updates", 2, "--overwrite"]
        run(scripts / f"{name}.py", *SMALL, *options, cwd=tmp_path)
        norms.append(lines(tmp_path / "run/metrics.jsonl")[0]["grad_norm"])
    assert norms[1] / norms[0] == pytest.approx(factor, rel=1e-3)


# --------------------------------------------------------------------------------------- LoRA
def adapted(lora, dtype="float32"):
    """The tiny SFT policy as lora.py trains it."""
    model = AutoModelForCausalLM.from_pretrained(TINY / "sft")
    precision = torch.get_float32_matmul_precision()
    lora.set_up_model(model, lora.Args(dtype=dtype), trainable=True)
    torch.set_float32_matmul_precision(precision)
    return model


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_trains_adapters_alone_the_same_in_every_process(dtype, scripts):
    lora, models = import_module("lora"), []
    for seed in (5, 6):
        torch.manual_seed(seed)
        models.append(dict(adapted(lora, dtype).named_parameters()))
    for name, weight in models[0].items():
        assert weight.requires_grad == ("lora_" in name)
        assert torch.equal(weight, models[1][name])
        rounded = "base_layer" in name  # linear layers
        assert weight.dtype == (getattr(torch, dtype) if rounded else torch.float32), name
    assert sum("lora_" in name for name in models[0]) == 2 * 4 * 4  # two factors, 4 layers of 4


def test_lora_saves_a_plain_model_in_which_adapters_alone_have_learned(scripts, tmp_path):
    """Also after a resume, which goes on as if nothing had been."""
    for folder, updates in (("run", 2), ("resumed", 1), ("resumed", 2)):
        options = ["--output-dir", folder, "--resume", "--num-updates", updates]
        run(scripts / "lora.py", *SMALL, *options, cwd=tmp_path)
    sft, merged = weights_of(TINY / "sft"), weights_of(tmp_path / "run/model")
    assert_close(weights_of(tmp_path / "resumed/model"), merged, rtol=0, atol=0)
    lora = import_module("lora")
    policy, reference = adapted(lora), AutoModelForCausalLM.from_pretrained(TINY / "sft")
    trained = torch.load(tmp_path / "run/checkpoint-000002.pt")["model"]
    policy.load_state_dict(trained)
    changed = {name for name in sft if not torch.equal(sft[name], merged[name])}
    assert changed == {name for name in sft if ".layers." in name and sft[name].ndim == 2}
    for name, weight in trained.items():
        assert "lora_" in name or torch.equal(weight, sft[name.replace("base_layer.", "")])
    ids = torch.arange(2, 60)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    with torch.no_grad():
        logits, base = policy(ids).logits, reference(ids).logits
        assert_close(model(ids).logits, logits, rtol=0, atol=1e-4)
        assert (logits - base).abs().max() > 1e-2  # it has learned
        off = lora.Reference(policy)
        hidden = off.base_model(ids).last_hidden_state
        assert_close(off.get_output_embeddings()(hidden), base, rtol=0, atol=1e-5)
        assert_close(policy(ids).logits, logits, rtol=0, atol=0)  # the adapters are on again


def test_fsdp2_computes_what_whole_models_do_also_after_a_resume(scripts, tmp_path):
    # Most responses end on their own. Processes have minibatches of their own, but for all rows.
    options = "--minibatch-size 8 --micro-batch-size 2 --num-epochs 2 --eval-every 1"
    options = [*SMALL, *options.split(), "--max-response-tokens", 48]
    run(scripts / "p3o_v2.py", *options, "--num-updates", 2, "--output-dir", "whole", cwd=tmp_path)
    for updates in (1, 2):
        run_two(scripts / "fsdp2.py", *options, "--num-updates", updates, "--resume", cwd=tmp_path)

    def logged(name):
        return [lines(tmp_path / folder / f"{name}.jsonl") for folder in ("run", "whole")]

    # Not means over all rows, and counts of ties, which rounding breaks
    left_out = "(policy/ratio_max|policy/pair_weight_std|win_rate_vs_sft)(_se)?"
    for name in ("metrics", "frontier"):
        assert_same(*logged(name), left_out, rel=1e-4, abs=1e-4)
    found, expected = logged("samples")
    assert sorted(found, key=str) == sorted(expected, key=str)
    folders = (TINY / "sft", tmp_path / "run/model", tmp_path / "whole/model")
    sft, found, expected = map(weights_of, folders)
    saved = torch.load(tmp_path / "run/checkpoint-000002.pt")["model"]
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        # Adam makes the same steps, 2e-4 each at first, but where the gradient is rounding error.
        error, moved = (weight - expected[name]).abs(), (weight - sft[name]).abs()
        assert error.median() < 1e-3 * moved.median() and torch.equal(weight, saved[name]), name


# --------------------------------------------------------------------------------- classifier.py
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
CHAT += "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A cactus?\n\nAssistant:"
ROWS = [("Hi", " Yes."), (HH, " Give it water, not often."), ("Why? " * 60, " No.")]


def save_judge(kind, folder):
    """A random model that reads pairs or one text, and a file that names it."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "sft")
    tokenizer.chat_template = CHAT if kind == "chat" else None
    shape, positions = ("bert", 512) if kind == "pair" else ("gpt2", 128)
    if kind == "pair":
        form = ("<e> $A <e>", "<e> $A <e> $B:1 <e>:1", [("<e>", tokenizer.eos_token_id)])
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(*form)
    model = build(shape, "score", 1, vocab_size=768, max_position_embeddings=positions)
    save(model, folder / "judge", tokenizer)
    code = (ROOT / "docs/examples/classifier.py").read_text()
    code, changes = re.subn("^NAME = .*$", f"NAME = '{folder}/judge'", code, flags=re.M)
    assert changes == 1
    (folder / "judge.py").write_text(code)
    return model, tokenizer


@pytest.mark.parametrize("kind", ["pair", "text", "chat"])
@torch.no_grad()
def test_a_classifier_reads_each_row_alone_in_its_own_form(kind, tmp_path, capsys):
    """A pair, one text of which the last 128 tokens count, or a dialogue of a chat template."""
    model, tokenizer = save_judge(kind, tmp_path)
    rows = ROWS[:2] if kind == "chat" else ROWS
    says = [["Hi", "Yes."], ["Hi", "Hello.", "A cactus?", "Give it water, not often."]]
    expected = []
    for i, (prompt, response) in enumerate(rows):
        inputs = tokenizer(prompt, response, return_tensors="pt")
        if kind == "text":
            inputs = tokenizer(prompt + response, return_tensors="pt")
            inputs = {"input_ids": inputs.input_ids[:, -128:]}
        if kind == "chat":
            roles = ("user", "assistant") * 2
            chat = [{"role": role, "content": text} for role, text in zip(roles, says[i])]
            inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        expected.append(model(**inputs).logits.item())
    score = runpy.run_path(tmp_path / "judge.py")["score"]
    assert score(*zip(*rows)) == pytest.approx(expected, rel=1e-5)
    assert score(*zip(*rows[1:2])) == pytest.approx(expected[1:2], rel=1e-5)  # whatever else
    assert len({round(x, 3) for x in expected}) == len(rows)
    assert ("1 of 3 texts cut" in capsys.readouterr().out) == (kind == "text")
    with pytest.raises(SystemExit, match="as_read"):  # the dialogue of another template
        score(["system\nBe kind.\nuser\nHi\nassistant\n"], ["Yes."])
