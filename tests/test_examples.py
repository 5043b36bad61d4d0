"""The diffs in docs/examples: they apply as they are, and the scripts that they make are right."""

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, Script, run
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import p3o_v2

DIFFS = sorted((ROOT / "docs/examples").glob("*.diff"))
SIZES = "--prompts-per-update 8 --minibatch-size 4 --num-epochs 1 --eval-prompts 8".split()
SHORT = [*SIZES, "--max-response-tokens", 16]
# Most responses end on their own. Processes have minibatches of their own, but for one of all rows.
LONG = "--prompts-per-update 8 --minibatch-size 8 --micro-batch-size 2 --num-epochs 2".split()
LONG += "--eval-prompts 8 --eval-every 1 --max-response-tokens 48".split()


def original(diff):
    """The script that a diff changes."""
    return ROOT / diff.read_text().split(maxsplit=2)[1]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A folder with p3o_v2.py, grpo.py and a changed copy for each diff, named as the diff is."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "tiny").symlink_to(ROOT / "tiny")
    for diff in DIFFS:
        shutil.copy(original(diff), folder)
        mine = shutil.copy(original(diff), folder / f"{diff.stem}.py")
        subprocess.run(["patch", "--silent", mine, diff], check=True)
    return folder


def module(script):
    spec = importlib.util.spec_from_file_location(script.stem, script)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_examples_are_these():
    names = [diff.stem for diff in DIFFS]
    assert names == ["dataset", "dr_grpo", "fsdp2", "lora", "rebel", "reward"]


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: diff.stem)
def test_a_diff_applies_exactly(diff):
    name = original(diff).name
    assert diff.read_text().startswith(f"--- {name}\n+++ {name}\n")
    command = ["patch", "--dry-run", name, diff]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout == f"checking file {name}\n"  # else: an offset, or fuzz


@pytest.mark.parametrize("diff", DIFFS, ids=lambda diff: diff.stem)
def test_a_changed_script_is_as_neat_as_the_original(diff, scripts):
    config = ["--config", ROOT / "pyproject.toml", "--no-cache", scripts / f"{diff.stem}.py"]
    for command in ("check", "format --check"):
        ruff = [sys.executable, "-m", "ruff", *command.split(), *config]
        said = subprocess.run(ruff, capture_output=True, text=True)
        assert said.returncode == 0, said.stdout


# --------------------------------------------------------------------------- data and rewards
def test_the_example_of_data_reads_a_csv_file(scripts, tmp_path):
    rows = [f'"How many are {n} and, well, one?",{n + 1}' for n in range(100)]
    (tmp_path / "sums.csv").write_text("\n".join(["question,answer", *rows]))
    (tmp_path / "right.py").write_text(
        "import csv\nanswers = {row['question']: row['answer'] for row in csv.DictReader(open('sums.csv'))}\n"
        "def right(prompts, responses):\n    questions = [x.split('Human: ')[1].split('\\n')[0] for x in prompts]\n"
        "    return [float(answers[x] in y) for x, y in zip(questions, responses)]\n"
    )
    options = ["--dataset", "sums.csv", "--reward-fn", "right.py:right", "--num-updates", 1]
    run(scripts / "dataset.py", *SHORT, *options, "--output-dir", "run", cwd=tmp_path)
    prompts = [row["prompt"] for row in lines(tmp_path / "run/samples.jsonl")]
    questions = [f"\n\nHuman: {row[1:].split('?')[0]}?\n\nAssistant:" for row in rows]
    assert prompts and set(prompts) <= set(questions)


@pytest.mark.parametrize("penalty", [0, 0.02])
def test_the_example_of_a_reward_subtracts_a_penalty_for_length(penalty, scripts, tmp_path):
    (tmp_path / "same.py").write_text(
        "def f(prompts, responses):\n    return [1.0] * len(prompts)\n"
    )
    options = ["--reward-fn", "same.py:f", "--length-penalty", penalty, "--num-updates", 1]
    options += ["--num-epochs", 1, "--output-dir", "run"]  # a single step, at π_θ = π_ref
    run(scripts / "reward.py", *LONG, *options, cwd=tmp_path)
    (row,) = lines(tmp_path / "run/metrics.jsonl")
    assert row["objective/reward"] == 1
    assert (row["grad_norm"] > 0.1) == (penalty > 0)


# -------------------------------------------------------------------------------------- REBEL
def test_rebel_begins_with_the_gradient_of_p3o_without_a_kl_penalty(scripts):
    old, ref, rewards = torch.randn(3, 5, 4, dtype=torch.float64)
    found = []
    for loss, beta in (
        (p3o_v2.pairwise_loss, 0),
        (module(scripts / "rebel.py").pairwise_loss, 0.3),
    ):
        logps = old.clone().requires_grad_()
        value, metrics = loss(logps, old, ref, rewards, beta, 0.2, 10.0)
        value.backward()
        assert not any(metric.requires_grad for metric in metrics.values())
        found.append((logps.grad, list(metrics)))
    assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_rebel_fits_log_ratios_to_rewards(scripts):
    """The loss is the squared error of Δ/η, but for a factor: 0 where Δ = η (r_1 − r_2), with η = 1/β."""
    old, ref, rewards, off = torch.randn(4, 5, 2, dtype=torch.float64)
    eta, loss = 5.0, module(scripts / "rebel.py").pairwise_loss
    assert loss(old + eta * rewards, old, ref, rewards, 1 / eta, 0.2, 10.0)[0] < 1e-20
    error = (off[:, 0] - off[:, 1]) / eta - (rewards[:, 0] - rewards[:, 1])
    value, _ = loss(old + off, old, ref, rewards, 1 / eta, 0.2, 10.0)
    assert_close(value, eta / 4 * error.square().mean())


def test_rebel_runs(scripts, tmp_path):
    run(scripts / "rebel.py", *SHORT, "--num-updates", 2, "--output-dir", "run", cwd=tmp_path)
    assert [row["step"] for row in lines(tmp_path / "run/metrics.jsonl")] == [1, 2]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")


# ------------------------------------------------------------------------------------ Dr. GRPO
def test_dr_grpo_takes_two_lines_away():
    changed = [row for row in DIFFS[1].read_text().splitlines()[2:] if row[0] in "+-"]
    assert [row.split(" = ")[0].split() for row in changed] == [
        ["-", "response_losses"],
        ["-", "advantages"],
    ]


def test_the_loss_of_dr_grpo_is_the_mean_over_responses_of_the_sums_over_tokens(scripts):
    torch.manual_seed(1)
    logprobs, old, ref = -torch.rand(3, 4, 3, 9, dtype=torch.float64)  # 4 prompts, 3 responses
    advantages, lengths = torch.randn(4, 3), torch.randint(1, 10, (4, 3))
    mask = torch.arange(9) < lengths[..., None]
    sums = []
    for b in range(4):
        for k in range(3):
            total = 0.0
            for t in range(lengths[b, k]):
                ratio = (logprobs[b, k, t] - old[b, k, t]).exp()
                h = ref[b, k, t] - logprobs[b, k, t]
                gain = torch.min(advantages[b, k] * ratio, advantages[b, k] * ratio.clamp(0.8, 1.2))
                total += 0.3 * (h.exp() - h - 1) - gain
            sums.append(total)
    loss, _ = module(scripts / "dr_grpo.py").policy_loss(
        logprobs, old, ref, advantages, mask, 0.3, 0.2
    )
    assert_close(loss, sum(sums) / 12)


@pytest.mark.parametrize("name, factor", [("grpo", 1), ("dr_grpo", 10)])
def test_dr_grpo_does_not_divide_rewards_by_their_deviation(name, factor, scripts, tmp_path):
    """Rewards ten times as large make its first gradient ten times as large, but not GRPO's."""
    (tmp_path / "rewards.py").write_text(
        "def one(prompts, responses):\n    return [float(len(y)) for y in responses]\n"
        "def ten(prompts, responses):\n    return [10.0 * len(y) for y in responses]\n"
    )
    norms = []
    for reward in ("one", "ten"):
        options = ["--reward-fn", f"rewards.py:{reward}", "--beta", 0, "--num-updates", 2]
        run(scripts / f"{name}.py", *SHORT, *options, "--output-dir", reward, cwd=tmp_path)
        rows = lines(tmp_path / reward / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2]
        norms.append(rows[0]["grad_norm"])
    assert norms[1] / norms[0] == pytest.approx(factor, rel=1e-3)


# --------------------------------------------------------------------------------------- LoRA
@pytest.fixture(scope="module")
def lora(scripts):
    return module(scripts / "lora.py")


@pytest.fixture(scope="module")
def lora_run(scripts, tmp_path_factory):
    """The folder of a run of two updates."""
    folder = tmp_path_factory.mktemp("lora")
    run(scripts / "lora.py", *SHORT, "--num-updates", 2, "--output-dir", "run", cwd=folder)
    return folder / "run"


def adapted(lora, dtype="float32"):
    """The tiny SFT policy as lora.py trains it."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/sft")
    rank = lora.Args.lora_rank
    args = SimpleNamespace(dtype=dtype, seed=1, lora_rank=rank, gradient_checkpointing=False)
    precision = torch.get_float32_matmul_precision()
    lora.set_up_model(model, args, trainable=True)
    torch.set_float32_matmul_precision(precision)
    return model


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def checkpoint(folder):
    (file,) = folder.glob("checkpoint-*.pt")
    return torch.load(file)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_trains_adapters_alone_the_same_in_every_process(dtype, lora):
    torch.manual_seed(5)
    first = dict(adapted(lora, dtype).named_parameters())
    torch.manual_seed(6)
    for name, weight in adapted(lora, dtype).named_parameters():
        assert weight.requires_grad == ("lora_" in name)
        assert_close(weight, first[name], rtol=0, atol=0)
        rounded = "base_layer" in name  # linear layers
        assert weight.dtype == (getattr(torch, dtype) if rounded else torch.float32), name
    assert sum("lora_" in name for name in first) == 2 * 4 * 4  # two factors, 4 layers of 4 each


def test_lora_saves_the_policy_as_a_plain_model(lora, lora_run):
    sft = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/sft")
    merged = AutoModelForCausalLM.from_pretrained(lora_run / "model")
    policy = adapted(lora)
    policy.load_state_dict(checkpoint(lora_run)["model"])
    ids = torch.arange(2, 60)[None]
    with torch.no_grad():
        logits, base = policy(ids).logits, sft(ids).logits
        assert_close(merged(ids).logits, logits, rtol=0, atol=1e-4)
        assert (logits - base).abs().max() > 1e-2  # it has learned
        reference = lora.Reference(policy)
        hidden = reference.base_model(ids).last_hidden_state
        assert_close(reference.get_output_embeddings()(hidden), base, rtol=0, atol=1e-5)
        assert_close(policy(ids).logits, logits, rtol=0, atol=0)  # the adapters are on again


def test_lora_changes_no_weight_but_by_the_adapters(lora_run):
    sft, merged = weights_of(ROOT / "tiny/sft"), weights_of(lora_run / "model")
    trained = checkpoint(lora_run)["model"]
    assert sft.keys() == merged.keys()
    adapted = set()
    for name, weight in trained.items():
        if "lora_" not in name:
            name = name.replace("base_layer.", "")
            assert_close(weight, sft[name], rtol=0, atol=0)
            if not torch.equal(merged[name], weight):
                adapted.add(name)
    linear = {name for name in sft if ".layers." in name and sft[name].ndim == 2}
    assert adapted == linear


def test_lora_resumes_as_if_nothing_had_been(scripts, lora_run, tmp_path):
    for updates in (1, 2):
        options = ["--num-updates", updates, "--resume", "--output-dir", "run"]
        run(scripts / "lora.py", *SHORT, *options, cwd=tmp_path)
    assert_close(weights_of(tmp_path / "run/model"), weights_of(lora_run / "model"), rtol=0, atol=0)


# -------------------------------------------------------------------------------------- FSDP2
def in_two(script, *args, cwd):
    """Run a script in two processes that start at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**env, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"} for rank in "01"]
    for process in [Script(script, *args, cwd=cwd, **env) for env in ranks]:
        code, said = process.wait(120)
        assert code == 0 and "Traceback" not in said, said


@pytest.fixture(scope="module")
def whole_run(scripts, tmp_path_factory):
    """The folder of an unchanged run of two updates in one process."""
    folder = tmp_path_factory.mktemp("whole")
    run(scripts / "p3o_v2.py", *LONG, "--num-updates", 2, "--output-dir", "run", cwd=folder)
    return folder / "run"


@pytest.fixture(scope="module")
def sharded_run(scripts, tmp_path_factory):
    """The folder of the same run with FSDP2, one update and a resume."""
    folder = tmp_path_factory.mktemp("sharded")
    first = ["--num-updates", 1, "--output-dir", "run"]
    in_two(scripts / "fsdp2.py", *LONG, *first, cwd=folder)
    options = ["--num-updates", 2, "--resume", "--output-dir", "run"]
    in_two(scripts / "fsdp2.py", *LONG, *options, cwd=folder)
    return folder / "run"


def test_fsdp2_computes_what_whole_models_do_also_after_a_resume(whole_run, sharded_run):
    for name in ("metrics.jsonl", "frontier.jsonl"):
        expected, found = lines(whole_run / name), lines(sharded_run / name)
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        for row, other in zip(found, expected):
            # Not means over all rows, and counts of ties, which rounding breaks
            for key in ("policy/ratio_max", "policy/pair_weight_std", "win_rate_vs_sft"):
                for each in (key, f"{key}_se", "time/update"):
                    row.pop(each, None), other.pop(each, None)
            assert row == pytest.approx(other, rel=1e-4, abs=1e-4)


def test_fsdp2_saves_a_plain_model_that_has_made_the_same_steps(whole_run, sharded_run):
    sft = weights_of(ROOT / "tiny/sft")
    expected, found = (weights_of(folder / "model") for folder in (whole_run, sharded_run))
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        # Adam makes the same steps, 2e-4 each at first, but where the gradient is rounding error.
        error, moved = (weight - expected[name]).abs(), (weight - sft[name]).abs()
        assert error.median() < 1e-3 * moved.median(), name
        saved = checkpoint(sharded_run)["model"][name]
        assert_close(weight, saved, rtol=0, atol=0)


def test_fsdp2_samples_different_numbers_of_tokens_in_its_processes(whole_run, sharded_run):
    expected, found = (lines(folder / "samples.jsonl") for folder in (whole_run, sharded_run))
    assert sorted(found, key=str) == sorted(expected, key=str)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/sft")
    lengths = torch.tensor([len(tokenizer(row["response"]).input_ids) for row in found])
    longest = lengths.view(-1, 2, 4).amax(2)  # [evaluations, processes]
    assert (longest[:, 0] != longest[:, 1]).any()


def test_fsdp2_asks_for_several_processes(scripts, tmp_path):
    said = run(scripts / "fsdp2.py", *SHORT, cwd=tmp_path, code=2)
    assert said.endswith("fsdp2.py: FSDP needs several processes: torchrun --nproc_per_node N\n")
