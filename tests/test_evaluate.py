"""evaluate.py: its estimates against exact ones, its pictures and tables on made-up and real runs, its judge against a
server that misbehaves and against a real one."""

import itertools
import json
import math
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import Script, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import evaluate
from evaluate import (
    Compare,
    Frontier,
    Limit,
    UserError,
    best_of_n,
    limit_curve,
    read_verdict,
    reward_at,
    win_rate,
)

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = "--prompts-per-update 8 --num-epochs 2 --minibatch-size 4 --max-response-tokens 48 --eval-prompts 16".split()
SMALL_LIMIT = "limit --eval-prompts 4 --max-response-tokens 24 --output-dir limit".split()


# ------------------------------------------------------------------------------------------------------------ estimates
@pytest.fixture(scope="module")
def world():
    """A policy whose answers can be counted: [P, V] probabilities and rewards, and N answers [P, N] drawn from it."""
    generator = torch.Generator().manual_seed(1)
    probs = torch.randn(6, 40, dtype=torch.float64, generator=generator).softmax(1)
    rewards = torch.randn(6, 40, dtype=torch.float64, generator=generator)
    return probs, rewards, torch.multinomial(probs, 50_000, replacement=True, generator=generator)


def exact_curve(probs, rewards, temperatures):
    for b in temperatures:
        logp = (probs.log() + rewards / b).log_softmax(1)
        p = logp.exp()
        yield (p * (logp - probs.log())).sum(1).mean().item(), (p * rewards).sum(1).mean().item()


def test_limit_is_the_exact_frontier(world):
    probs, rewards, drawn = world
    temperatures = [10 ** (2 - i / 100) for i in range(400)]
    exact = list(exact_curve(probs, rewards, temperatures))
    curve = limit_curve(
        rewards.gather(1, drawn), temperatures[::20], gold=-rewards.gather(1, drawn)
    )
    start, checked = (probs * rewards).sum(1).mean().item(), 0
    for kl, reward, ess, gold in zip(
        *(curve[key].tolist() for key in ("kl", "reward", "ess", "gold"))
    ):
        assert gold == pytest.approx(-reward)
        if 0.1 < kl < math.log(drawn.shape[1]) - 4.5 and ess >= 50:
            best = reward_at(exact, kl)
            assert reward == pytest.approx(best, abs=0.01 * (best - start))
            checked += 1
    assert checked >= 8
    assert (curve["kl"].diff() > 0).all() and (curve["reward"].diff() > 0).all()


@pytest.mark.parametrize("n", [1, 3])
def test_best_of_n_is_the_mean_over_all_draws(n):
    generator = torch.Generator().manual_seed(n)
    rewards, gold = torch.randn(2, 2, 6, generator=generator)
    bests = [
        max(draw, key=lambda i: row[i])
        for row in rewards
        for draw in itertools.combinations(range(6), n)
    ]
    prompt = [p for p in range(2) for _ in itertools.combinations(range(6), n)]
    for values in (rewards, gold):
        expected = sum(values[p, i].item() for p, i in zip(prompt, bests)) / len(bests)
        assert best_of_n(rewards, n, values) == pytest.approx(expected, rel=1e-6)


PATH = [(0.0, 1.0), (1.0, 3.0), (2.0, 2.0)]


@pytest.mark.parametrize(
    "points, kappa, expected",
    [
        (PATH, 0.5, 2.0),  # crossed between two points
        (PATH, 1.0, 3.0),
        (PATH, 2.0, 3.0),  # the best so far, not the last
        (PATH, 9.0, 3.0),  # never reached
        ([(0.0, 1.0), (3.0, 4.0), (1.0, 3.5)], 2.0, 3.75),  # crossed on the way back, above
        ([(0.0, 1.0), (3.0, 4.0), (1.0, 3.5)], 1.0, 3.5),
        ([(0.0, 1.0)], 1.0, 1.0),
        ([(1.0, 1.0), (1.0, 2.0)], 1.0, 2.0),  # no division by the distance of equal KLs
    ],
)
def test_reward_at(points, kappa, expected):
    assert reward_at(points, kappa) == pytest.approx(expected)


def test_win_rate_and_its_interval():
    found = win_rate(torch.tensor([1.0] * 60 + [0.5] * 20 + [0.0] * 20))
    assert found["win_rate"] == 0.7 and found["prompts"] == 100
    assert (found["low"], found["high"]) == pytest.approx(
        (0.6042, 0.7811), abs=1e-4
    )  # Wilson's, of 70 in 100
    assert win_rate(torch.ones(10))["low"] < 0.8 and win_rate(torch.ones(0))["win_rate"] is None


# ------------------------------------------------------------------------------------------------------------- frontier
def make_run(
    folder, seed, points, script="p3o_v2", reward="somewhere/tiny/reward_model", **changes
):
    folder.mkdir(parents=True)
    args = {
        "seed": seed,
        "output_dir": str(folder),
        "model": "tiny",
        "dataset": "tiny",
        "beta": 0.05,
    } | changes
    record = {"script": script, "base_name": "tiny", "policy": "", "reward": reward, "args": args}
    (folder / "args.json").write_text(json.dumps(record))
    rows = [
        {"step": i, "kl": kl, "kl_se": 0.1, "reward": r, "reward_se": 0.2, "gold": -r}
        for i, (kl, r) in points
    ]
    (folder / "frontier.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    """Two seeds of one curve, one run of another and one of another script."""
    first = make_run(tmp_path / "a", 1, enumerate([(0, 1), (1, 2), (3, 4)]))
    second = make_run(tmp_path / "b", 2, enumerate([(0, 1), (1, 3), (3, 5)]))
    third = make_run(tmp_path / "c", 1, enumerate([(0, 1), (0.5, 2)]), beta=0.1)
    return [first, second, third, make_run(tmp_path / "d", 1, enumerate([(0, 1), (2, 2)]), "ppo")]


def make_limit(file, **changes):
    curve = [
        {"b": 1, "kl": kl, "reward": 1 + 2 * kl, "ess": 99, "trusted": kl < 2}
        for kl in (0.5, 1, 2, 5)
    ]
    args = {"dataset": "tiny", "temperature": 1.0} | changes
    best = [{"n": 1, "kl": 0, "reward": 1}, {"n": 4, "kl": 0.64, "reward": 2}]
    limit = {
        "args": args,
        "base_name": "tiny",
        "reward": "tiny/reward_model",
        "num_samples": 64,
        "ref_reward": 1.0,
    }
    Path(file).write_text(json.dumps(limit | {"curve": curve, "best_of_n": best}))
    return str(file)


def test_frontier(runs, tmp_path):
    limit = make_limit(tmp_path / "limit.json")
    options = ["--output", "pictures/f.png", "--limit", limit, "--kls", "0.5", "2"]
    output = run("evaluate", "frontier", *runs, *options, cwd=tmp_path)
    assert (tmp_path / "pictures/f.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "pictures/f.png").stat().st_size > 20_000
    curves = json.loads((tmp_path / "pictures/f.json").read_text())["curves"]
    assert set(curves) == {"p3o_v2 --beta 0.05", "p3o_v2 --beta 0.1", "ppo"}
    pair, other, ppo = curves["p3o_v2 --beta 0.05"], curves["p3o_v2 --beta 0.1"], curves["ppo"]
    assert pair["seeds"] == [1, 2] and [point["reward"] for point in pair["path"]] == [1, 2.5, 4.5]
    assert [point["reward_se"] for point in pair["path"]] == [0, 0.5, 0.5]
    assert pair["reward_at"]["2"]["reward"] == 3.5 and pair["reward_at"]["2"][
        "reward_se"
    ] == pytest.approx(0.5)
    assert pair["reward_at"]["2"]["reached"] and pair["reward_at"]["2"]["share"] == pytest.approx(
        2.5 / 4
    )
    assert pair["reward_at"]["0.5"]["share"] == pytest.approx(0.75)  # (1.75 − 1) / (2 − 1)
    assert other["reward_at"]["2"] | {"share": 0} == {
        "reward": 2, "reward_se": None, "reached": False, "largest_kl": 0.5, "limit": 5, "share": 0
    }  # fmt: skip
    assert other["path"][1]["reward_se"] == 0.2  # of a single seed: over prompts
    assert ppo["fit"] == pytest.approx({"a": 1, "b": 0.5, "r2": 1})
    row = next(line for line in output.splitlines() if "--beta 0.05" in line)
    assert "1.75 ± 0.25, 75%  " in row and "3.50 ± 0.50, 62% (limit too low)" in row
    assert "2.00 (KL ≤ 0.50)" in output and "1.00 + 0.50·KL, R² 1.00" in output
    assert re.search(r"\| limit .* 2.00 .* 5.00 \(too few samples\)", output)


def test_what_leaves_a_curve_as_it_is_makes_no_other_curve(runs, tmp_path):
    """Seeds with and without --track or --config, and of a version that had neither."""
    changes = {"track": True, "config": "args.json", "dry_run": False}
    other = make_run(tmp_path / "e", 3, enumerate([(0, 1), (2, 2)]), **changes)
    found = evaluate.frontier(Frontier((*runs[:2], other), tmp_path / "f.png"))
    assert [curve["seeds"] for curve in found["curves"].values()] == [[1, 2, 3]]


def flat(folder, **changes):
    """Writes the record of a run as the scripts of the second plan do."""
    record = json.loads((Path(folder) / "args.json").read_text())
    record |= record.pop("args") | changes
    del record["base_name"]
    (Path(folder) / "args.json").write_text(json.dumps(record))


def test_runs_of_both_plans_are_read_alike(runs, tmp_path):
    """Settings beside the rest of the record, and a model by its short name."""
    nested = [evaluate.read_record(folder) for folder in runs]
    for folder, before in zip(runs, nested):
        flat(folder)
        found = evaluate.read_record(folder)
        assert found["args"].pop("stop") == [] and found == before
    limit = make_limit(tmp_path / "limit.json")
    found = evaluate.frontier(Frontier(tuple(runs), tmp_path / "f.png", limit=limit))
    assert set(found["curves"]) == {"p3o_v2 --beta 0.05", "p3o_v2 --beta 0.1", "ppo"}
    flat_run = make_run(tmp_path / "e", 1, [(0, (0, 1))])
    flat(flat_run, model="pythia-1b", dataset="hh")
    found = evaluate.read_record(flat_run)
    assert found["args"]["model"] == "EleutherAI/pythia-1b" and found["base_name"] == "pythia-1b"
    assert found["args"]["stop"] == [""]  # they end no answer on hh at a text
    for damaged in ("[1]", "{}", '{"script": "sft", "model": 3, "dataset": "tiny", "seed": 1}'):
        (Path(flat_run) / "args.json").write_text(damaged)
        with pytest.raises(UserError, match="args.json is damaged"):
            evaluate.read_record(flat_run)


def test_a_kl_that_a_seed_is_never_below(tmp_path, capsys):
    """Not a NaN, which JSON does not have; and a KL given twice is one column."""
    runs = [make_run(tmp_path / str(seed), seed, [(0, (seed, 1)), (1, (3, 2))]) for seed in (1, 2)]
    evaluate.frontier(Frontier(tuple(runs), tmp_path / "f.png", (1.5, 2.5, 1.5)))
    found = json.loads((tmp_path / "f.json").read_text(), parse_constant=pytest.fail)["curves"][
        "p3o_v2"
    ]["reward_at"]
    assert found["1.5"] == {"reward": None, "reward_se": None, "reached": True, "largest_kl": 3}
    assert found["2.5"]["reward"] == pytest.approx(1.625)
    header, _, row, *_ = capsys.readouterr().out.splitlines()
    assert header.count("reward at") == 2 and "none" in row and len(row) == len(header)


def broken(tmp_path, runs, case):
    folder = Path(runs[0])
    if case in ("empty", "broken", "number", "list"):
        text = {
            "empty": "",
            "broken": '{"step": 0, "kl"',
            "number": '{"step": 0, "kl": 0}',
            "list": "[1]",
        }[case]
        (folder / "frontier.jsonl").write_text(text)
    if case == "no frontier":
        (folder / "frontier.jsonl").unlink()
    if case == "args":
        (folder / "args.json").write_text("{")
    other = {
        "dataset": lambda: make_run(tmp_path / "e", 3, [(0, (0, 1))], dataset="hh"),
        "reward": lambda: make_run(tmp_path / "e", 3, [(0, (0, 1))], reward="my.py:f"),
        "twice": lambda: make_run(tmp_path / "e", 1, [(0, (0, 1))]),
        "nowhere": lambda: str(tmp_path / "nowhere"),
        "no run": lambda: str(tmp_path),
    }.get(case)
    return {"runs": (*runs, other()) if other else () if case == "none" else tuple(runs)}


@pytest.mark.parametrize(
    "case, sentence",
    {
        "none": "expected the folder of a run",
        "nowhere": "nowhere: no such folder",
        "no run": "no run, it has no args.json",
        "no frontier": "a: the run has no frontier.jsonl",
        "empty": "frontier.jsonl is empty",
        "broken": "line 1 is no point of a frontier",
        "list": "line 1 is no point of a frontier",
        "number": "line 1 is no point of a frontier \\(no number for reward; found step, kl\\)",
        "args": "args.json is damaged",
        "dataset": "e cannot be drawn with .*a: it has dataset 'hh', not 'tiny'",
        "reward": "e cannot be drawn with .*a: it has reward 'my.py:f', not 'tiny'",
        "twice": "another of the runs has the same settings and the same seed",
    }.items(),
)
def test_frontier_refuses(case, sentence, runs, tmp_path):
    with pytest.raises(UserError, match=sentence):
        evaluate.frontier(Frontier(**broken(tmp_path, runs, case), output=tmp_path / "f.png"))
    assert not (tmp_path / "f.png").exists()


def test_the_gold_of_a_limit_is_the_runs(tmp_path):
    run = make_run(tmp_path / "a", 1, [(0, (0, 1))], gold_fn="mine.py:f")
    limit = make_limit(tmp_path / "limit.json", gold_fn="other.py:f")
    evaluate.frontier(Frontier((run,), tmp_path / "f.png", limit=limit))
    with pytest.raises(UserError, match="it has gold_fn 'other.py:f', .* has 'mine.py:f'"):
        evaluate.frontier(Frontier((run,), tmp_path / "f.png", limit=limit, reward="gold"))


# ------------------------------------------------------------------------------------------- limit, killed and gone on
def limit(folder, num_samples, **options):
    """limit.json of a small limit made in this process."""
    sizes = {
        "eval_prompts": 4,
        "max_response_tokens": 24,
        "output_dir": str(folder),
        "num_samples": num_samples,
    }
    evaluate.main(Limit(**sizes, **options))
    found = json.loads((folder / "limit.json").read_text())
    assert found["args"].pop("output_dir") == str(folder)
    return found


def test_limit_killed_goes_on_to_the_same_numbers(tmp_path, capsys):
    script = Script("evaluate", *SMALL_LIMIT, "--num-samples", 100_000, cwd=tmp_path)
    first, end = limit(tmp_path / "whole", 96), time.monotonic() + 120
    assert first["num_samples"] == 96 and first["num_prompts"] == 4 and "gold" in first["curve"][0]
    assert first["curve"][-1]["kl"] > 2 and first["best_of_n"][3]["n"] == 8
    assert first["best_of_n"][3]["reward"] > first["ref_reward"]
    assert not any(row["trusted"] for row in first["curve"] if row["ess"] < 50)
    printed = capsys.readouterr().out
    assert (
        "best of 8" in printed and "effective samples" in printed and "made before" not in printed
    )
    file = tmp_path / "limit/rewards.pt"
    while not file.exists():
        assert time.monotonic() < end, script.said()
        time.sleep(0.01)
    os.kill(script.pid, 9)
    assert limit(tmp_path / "limit", 96) == first
    assert "a prompt made before" in capsys.readouterr().out
    refused = run("evaluate", *SMALL_LIMIT, "--temperature", 0.7, cwd=tmp_path, code=2)
    assert "is of other samples, with temperature 1.0 (now 0.7). Pass --overwrite" in refused


def test_limit_uses_the_samples_that_are_there(tmp_path, capsys):
    first = limit(tmp_path, 64)
    assert first["curve"][0]["kl"] < 0.01
    second = limit(tmp_path, 64, b_values=(1.0, 3.0))
    assert [row["b"] for row in second["curve"]] == [3, 1] and second["best_of_n"] == first[
        "best_of_n"
    ]
    assert "64 a prompt made before" in capsys.readouterr().out
    reward = tmp_path / "mine.py"
    reward.write_text("def f(prompts, responses):\n    return [len(y) for y in responses]\n")
    with pytest.raises(
        UserError, match="is of other samples, with reward 'reward_model .*' .now 'mine.py:f"
    ):
        limit(tmp_path, 64, reward_fn=f"{reward}:f")
    found = limit(tmp_path, 64, reward_fn=f"{reward}:f", overwrite=True)
    assert found["ref_reward"] > 10 and found["ref_gold"] == pytest.approx(first["ref_gold"])
    reward.write_text(reward.read_text().replace("len(y)", "-len(y)"))
    with pytest.raises(
        UserError, match="is of other samples, with reward"
    ):  # the same file, another function
        limit(tmp_path, 64, reward_fn=f"{reward}:f")
    (tmp_path / "rewards.pt").write_bytes(b"half")
    with pytest.raises(UserError, match="rewards.pt is damaged"):
        limit(tmp_path, 64)


# ---------------------------------------------------------------------------------------- a real run: all but the limit
@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """Of p3o_v1.py in run/, of p3o_v2.py, whose record is another, in new/."""
    folder = tmp_path_factory.mktemp("real")
    options = ["--num-updates", 2, "--eval-every", 2, "--seed", 2, *SMALL]
    run("p3o_v1", *options, "--truncate-prompts", "--output-dir", "run", cwd=folder)
    run("p3o_v2", *options, "--output-dir", "new", cwd=folder)
    return folder


def test_frontier_of_a_real_run(real_run):
    said = run("evaluate", "frontier", "run", "new", cwd=real_run)
    assert "p3o_v1" in said and "p3o_v2" in said
    assert (real_run / "runs/frontier.png").stat().st_size > 20_000
    assert EventAccumulator(str(real_run / "runs/frontier.tensorboard")).Reload().Tags()[
        "images"
    ] == ["frontier"]


def test_compare(real_run):
    """With what is not given as in the run: the answers of its last evaluation."""
    output = run(
        "evaluate", "compare", "run", "tiny", "run/model", "--truncate-prompts", cwd=real_run
    )
    found = json.loads((real_run / "runs/compare.json").read_text())
    as_in_the_run = {
        "max_response_tokens": 48,
        "seed": 2,
        "eval_prompts": 16,
        "truncate_prompts": True,
    }
    assert as_in_the_run.items() <= found["args"].items()
    last = json.loads((real_run / "run/frontier.jsonl").read_text().splitlines()[-1])
    trained, start, same = found["policies"]
    for key in ("reward", "gold", "kl", "length", "eos_rate", "reward_se"):
        assert trained[key] == pytest.approx(last[key], rel=1e-4, abs=1e-6), key
    assert start["kl"] == pytest.approx(0, abs=1e-6) and {**same, "policy": ""} == {
        **trained,
        "policy": "",
    }
    for matrix in (found["wins"]["reward"], found["wins"]["gold"]):
        assert (
            matrix[0][2]["win_rate"] == matrix[1][1]["win_rate"] == 0.5
        )  # the same policy, the same noise
        for i, j in itertools.product(range(3), repeat=2):
            assert matrix[i][j]["win_rate"] + matrix[j][i]["win_rate"] == pytest.approx(1)
            assert matrix[i][j]["low"] + matrix[j][i]["high"] == pytest.approx(1)
            assert matrix[i][j]["prompts"] == 16
    assert "Win rates by gold" in output and re.search(r"\| 3 +\| run/model", output)


def test_samples(real_run):
    output = run("evaluate", "samples", "run", "tiny", "--num", 3, cwd=real_run)
    text = (real_run / "runs/samples.md").read_text()
    assert text.strip() in output and text.count("## Prompt") == 3 and text.count("gold ") == 6
    last = json.loads((real_run / "run/samples.jsonl").read_text().splitlines()[-1])
    assert (
        f"**run**: reward {last['rewards'][0]:.2f}, gold" in text
    )  # the very answers of the last evaluation
    assert " ".join(last["responses"][0].split()) in " ".join(text.split())


def test_a_run_of_p3o_v2(real_run):
    """Its settings are taken over: those of its evaluations but for the random numbers, and the order of the prompts."""
    run("evaluate", "compare", "new", "tiny", "--output", "new.json", cwd=real_run)
    found = json.loads((real_run / "new.json").read_text())
    taken = {"max_response_tokens": 48, "seed": 2, "eval_prompts": 16, "dataset": "tiny"}
    assert taken.items() <= found["args"].items() and found["num_prompts"] == 16
    trained, start = found["policies"]
    assert abs(start["kl"]) < 1e-6 < trained["kl"]
    last = json.loads((real_run / "new/frontier.jsonl").read_text().splitlines()[-1])
    for key in ("reward", "gold", "kl", "length"):
        error = (trained[f"{key}_se"] ** 2 + last[f"{key}_se"] ** 2) ** 0.5
        assert abs(trained[key] - last[key]) < 4 * error, key
    said = run("evaluate", "samples", "new", "--num", 2, "--output", "new.md", cwd=real_run)
    assert said.count("**new**: reward ") == 2
    small = (
        "--num-samples 32 --eval-prompts 2 --max-response-tokens 48 --output-dir new_limit".split()
    )
    run("evaluate", "limit", *small, cwd=real_run)
    flags = ["--limit", "new_limit/limit.json", "--output", "new.png"]
    assert "is of other --eval-prompts than new" in run(
        "evaluate", "frontier", "new", *flags, cwd=real_run
    )


def test_settings_of_another_dataset_are_not_the_runs(tmp_path):
    changes = {"dataset": "mine.jsonl", "gold_fn": "mine.py:f", "temperature": 0.7}
    name = make_run(tmp_path / "a", 3, [(0, (0, 1))], **changes)
    same = evaluate.settings_of_run(Compare(models=(name,), dataset="mine.jsonl"))
    assert same["gold_fn"] == "mine.py:f" and same["seed"] == 3
    other = evaluate.settings_of_run(Compare(models=(name,), dataset="hh"))
    assert other["temperature"] == 0.7 and not {"dataset", "gold_fn"} & set(other)


@pytest.mark.parametrize(
    "command, sentence",
    {
        "frontier": "frontier: expected the folder of a run",
        "frontier run --limit run/args.json": "--limit run/args.json: it is no limit.json",
        "compare tiny": "compare: expected two policies or more",
        "compare tiny nowhere": "policy nowhere: no model is there",
        "compare run tiny --judge-url http://localhost/v1": "--judge-url: expected http",
        "compare half tiny": "half: the run has saved no model yet",
        "samples tiny --reward-fn nowhere.py:f": "--reward-fn nowhere.py:f: expected FILE.py:FUNCTION",
        "limit --dataset nowhere.jsonl": "no reward: run reward_model.py",
    }.items(),
)
def test_bad_input(command, sentence, real_run):
    (real_run / "half").mkdir(exist_ok=True)
    (real_run / "half/args.json").write_text((real_run / "run/args.json").read_text())
    if command.startswith("limit --dataset"):
        command += f" --model {ROOT}/tiny/sft"
    assert sentence in run("evaluate", *command.split(), cwd=real_run, code=2)


# ---------------------------------------------------------------------------------------------------------------- judge
VERDICTS = [
    ("A", 1),
    ("**B**", 0),
    (" tie.\n", 0.5),
    ("I think…\n\nAnswer: b", 0),
    ("It's a tie", 0.5),
    ("Option A", 1),
]


@pytest.mark.parametrize("reply, win", VERDICTS)
def test_read_verdict(reply, win):
    assert read_verdict(reply) == win


@pytest.mark.parametrize("reply", ["", "A good answer is B or A", "neither", "A B", "C"])
def test_no_verdict(reply):
    with pytest.raises(ValueError, match="no verdict"):
        read_verdict(reply)


@pytest.fixture
def server():
    """A judge at server.url that answers what server.reply(answer A, answer B, number of this request) says: a text, a
    status, or bytes that are the whole body."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            a, b = re.search(
                r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nReply", text, re.DOTALL
            ).groups()
            httpd.requests.append(
                {**body, "a": a, "b": b, "path": self.path, "headers": dict(self.headers)}
            )
            reply = httpd.reply(a, b, len(httpd.requests))
            self.send_response(reply if isinstance(reply, int) else 200)
            self.end_headers()
            content = {"choices": [{"message": {"content": reply}}]}
            self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(content).encode())

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.requests, httpd.url = [], f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.handle_error = lambda *_: None  # of a client that waits no longer
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def judge(server, tmp_path, monkeypatch):
    """judge(rows, …) -> evaluate's wins of the rows by that server."""
    monkeypatch.setattr(evaluate.time, "sleep", lambda _: None)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def wins(rows, **options):
        options = {
            "judge_url": server.url,
            "judge_model": "m",
            "judge_cache": tmp_path / "cache.jsonl",
        } | options
        return evaluate.judge_wins(Compare(**options), rows)

    return wins


ROWS = [("q", "good", "bad"), ("q", "bad", "good"), ("r", "good", "fine"), ("r", "same", "same")]


def prefer_good(a, b, _):
    return "A" if a == "good" else "B" if b == "good" else "tie"


def test_judge_asks_in_both_orders_and_never_again(server, judge, monkeypatch, tmp_path):
    server.reply = prefer_good
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert judge(ROWS) == [1, 0, 1, 0.5]
    asked = {(request["a"], request["b"]) for request in server.requests}
    assert asked == {("good", "bad"), ("bad", "good"), ("good", "fine"), ("fine", "good")}
    assert (
        len(server.requests) <= 6
    )  # equal answers are not asked about; equal questions at once may be
    for request in server.requests:
        assert (
            request["path"] == "/v1/chat/completions"
            and request["headers"]["Authorization"] == "Bearer secret"
        )
        assert request.keys() - {"a", "b", "path", "headers"} == {
            "model",
            "messages",
            "temperature",
            "max_tokens",
        }
        assert request["temperature"] == 0 and request["model"] == "m"
    assert "secret" not in (tmp_path / "cache.jsonl").read_text()

    server.requests.clear()
    assert judge(ROWS) == [1, 0, 1, 0.5] and not server.requests
    assert judge(ROWS[:1], judge_model="other") == [1] and len(server.requests) == 2
    assert judge(ROWS[:1], judge_url=server.url + "/") == [1] and len(server.requests) == 2


@pytest.mark.parametrize("wrong", ["Both are nice.", 500, b"not JSON", b'{"choices": []}'])
def test_judge_is_asked_again(wrong, server, judge, capsys):
    server.reply = lambda a, b, number: wrong if number <= 2 else prefer_good(a, b, number)
    assert judge(ROWS[:1], judge_workers=1) == [1] and len(server.requests) == 4
    assert "1 pairs, 0 unjudged" in capsys.readouterr().out


def test_judge_without_verdict_is_counted(server, judge, capsys):
    server.reply = lambda a, b, number: 503 if "fine" in (a, b) else prefer_good(a, b, number)
    assert judge(ROWS, judge_retries=1) == [1, 0, None, 0.5]
    assert (
        "4 pairs, 1 unjudged (the last because of HTTPError: HTTP Error 503"
        in capsys.readouterr().out
    )
    assert sum("fine" in (request["a"], request["b"]) for request in server.requests) == 4
    server.reply = prefer_good
    assert judge(ROWS) == [1, 0, 1, 0.5]  # what was unjudged is asked again


def test_compare_with_a_judge(real_run, server):
    server.reply = lambda a, b, _: "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"
    options = [
        "--eval-prompts",
        8,
        "--judge-url",
        server.url,
        "--judge-model",
        "m",
        "--output",
        "judged.json",
    ]
    output = run("evaluate", "compare", "run", "tiny", *options, cwd=real_run)
    wins = json.loads((real_run / "judged.json").read_text())["wins"]["judge"]
    assert wins[0][1]["prompts"] == 8 and wins[0][1]["win_rate"] + wins[1][0][
        "win_rate"
    ] == pytest.approx(1)
    assert "8 pairs, 0 unjudged" in output and "Win rates by judge" in output
