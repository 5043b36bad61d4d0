"""evaluate.py, limit.py and plot_frontier.py: estimates against exact values, tables against counting, a judge against
a small local server, and runs that come from anywhere."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import Script, run
from transformers import AutoTokenizer

import evaluate
import limit
import plot_frontier

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = "--max-response-tokens 32 --eval-prompts 16".split()


# ---------------------------------------------------------------------------------------- limit.py
def test_the_limit_is_the_exact_frontier():
    """Of a policy whose answers, 40 to each of 6 prompts, can be counted."""
    generator = torch.Generator().manual_seed(1)
    logits, rewards = torch.randn(2, 6, 40, dtype=torch.float64, generator=generator)
    probs = logits.softmax(1)
    drawn = torch.multinomial(probs, 50_000, replacement=True, generator=generator)
    drawn = rewards.gather(1, drawn)
    points = []
    for i in range(400):
        logp = (probs.log() + rewards / 10 ** (2 - i / 100)).log_softmax(1)
        kl = (logp.exp() * (logp - probs.log())).sum(1).mean().item()
        points.append({"kl": kl, "reward": (logp.exp() * rewards).sum(1).mean().item()})
    start = (probs * rewards).sum(1).mean().item()
    numbers = limit.limit_numbers({"reward": drawn, "gold": -drawn})
    trusted = [row for row in numbers["curve"] if row["trusted"]]
    for row in trusted:
        assert row["ess"] >= 50 and row["kl"] < math.log(50_000) - 4.5
        assert row["gold"] == pytest.approx(-row["reward"])
        if row["kl"] > 0.1:
            gain = plot_frontier.best_within(points, row["kl"])["reward"] - start
            assert row["reward"] - numbers["ref_reward"] == pytest.approx(gain, rel=0.01)
            assert abs(row["more_than_half"]) < 0.01
    assert trusted[-1]["kl"] > 2 and json.dumps(numbers)
    kl, column = [[row[name] for row in numbers["curve"]] for name in ("kl", "reward")]
    assert kl == sorted(kl) and column == sorted(column)
    few = limit.limit_numbers({"reward": drawn[:, :128]})["curve"]
    assert not any(row["trusted"] for row in few if row["kl"] > math.log(128) - 4.5)
    assert min(row["more_than_half"] for row in few if row["kl"] > 2) > 0.003


@pytest.mark.parametrize("n", [1, 3])
def test_best_of_n_is_the_mean_over_all_draws(n):
    values = torch.randn(2, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    values = {"reward": values[0], "gold": values[1]}
    expected = {"reward": 0, "gold": 0}
    draws = list(itertools.product(range(2), itertools.combinations(range(6), n)))
    for b, draw in draws:
        best = max(draw, key=lambda i: values["reward"][b, i])
        for name in expected:
            expected[name] += values[name][b, best].item() / len(draws)
    assert limit.best_of_n(values, n) == pytest.approx(expected)


def make_limit(folder, num_samples, **changes):
    """limit.json, less the folder, and the kept rewards of limit.py on four prompts."""
    options = {"num_samples": num_samples, "eval_prompts": 4, "max_response_tokens": 8, **changes}
    limit.main(limit.Args(output_dir=str(folder), **options))
    numbers = json.loads((folder / "limit.json").read_text())
    del numbers["output_dir"]
    return numbers, torch.load(folder / "samples.pt")["values"]["reward"]


def test_a_killed_limit_goes_on_and_more_samples_are_added(tmp_path):
    file = tmp_path / "a/samples.pt"
    flags = ["--eval-prompts", 4, "--num-samples", 10**6, "--output-dir", "a"]
    script = Script("limit", *flags, "--max-response-tokens", 8, cwd=tmp_path)
    end = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < end, script.said()
        time.sleep(0.01)
    os.kill(script.pid, 9)
    before = torch.load(file)["values"]["reward"]
    N = before.shape[1] + 32
    numbers, rewards = make_limit(file.parent, N - 12)  # rounded up
    whole, all_rewards = make_limit(tmp_path / "b", N)
    assert torch.equal(rewards, all_rewards) and torch.equal(rewards[:, : N - 32], before)
    assert numbers == whole and not torch.equal(rewards[:, :16], rewards[:, 16:32])
    assert (whole["num_samples"], whole["num_prompts"]) == (N, 4)
    assert [row["n"] for row in whole["best_of_n"]][:3] == [1, 2, 4]
    assert whole["best_of_n"][0]["gold"] == pytest.approx(whole["ref_gold"])
    with pytest.raises(limit.UserError, match="is of temperature 1.0, not 0.7: pass another"):
        make_limit(tmp_path / "b", N, temperature=0.7)


def test_samples_of_a_function_that_has_changed_are_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def f(prompts, responses):\n    return [len(y) for y in responses]\n")
    numbers, _ = make_limit(tmp_path, 16, reward_fn=f"{file}:f")
    assert make_limit(tmp_path, 16, reward_fn=f"{file}:f")[0] == numbers
    file.write_text(file.read_text().replace("len", "-len"))
    with pytest.raises(limit.UserError, match="samples.pt is of another model or reward"):
        make_limit(tmp_path, 16, reward_fn=f"{file}:f")


# ------------------------------------------------------------------------------------- evaluate.py
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a run of p3o_v2.py in run/, whose settings are not the defaults, and a reward in words.py."""
    folder = tmp_path_factory.mktemp("runs")
    sizes = "--num-updates 2 --prompts-per-update 8 --minibatch-size 4 --num-epochs 2 --seed 2"
    rate = ["--learning-rate", 1e-3, "--output-dir", "run"]
    run("p3o_v2", *sizes.split(), *SMALL, *rate, cwd=folder)
    code = "def score(prompts, responses):\n    return [len(y.split()) for y in responses]\n"
    (folder / "words.py").write_text(code)
    return folder


def rows_after(title, output):
    """The cells of a printed table, its header left out; cells are two spaces apart or more."""
    lines = output.partition(title)[2].partition("\n\n")[0].splitlines()[2:]
    return [re.split(r" {2,}", line.strip()) for line in lines]


def last_samples(folder):
    rows = [json.loads(line) for line in (folder / "run/samples.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] == 2]


def test_a_run_is_evaluated_as_it_was_in_training(folder):
    """The same prompts, answers, reward and reference; and the same policy twice, as a run and as a model, ties."""
    said = run("evaluate", "run", "tiny", "run/model", "--show", 3, cwd=folder)
    last = json.loads((folder / "run/frontier.jsonl").read_text().splitlines()[-1])
    means = rows_after("Means over 16 prompts", said)
    expected = []
    for key in ("reward", "gold", "kl", "length", "eos_rate"):
        expected.append(f"{last[key]:.3f} ± {last[f'{key}_se']:.3f}")
    assert means[0] == ["1 run", *expected] and means[2] == ["3 run/model", *expected]
    assert last["kl"] > 0.01 and means[1][3] == "0.000 ± 0.000"

    rates = rows_after("Win rates by reward", said)
    assert rates[0][1].startswith(f"{last['win_rate_vs_sft']:.3f} [")
    assert rates[0][2][:5] == rates[2][1][:5] == "0.500"
    assert float(rates[0][1][:5]) + float(rates[1][1][:5]) == pytest.approx(1)
    for row in last_samples(folder)[:15:5]:  # three of 16
        assert row["prompt"].strip().splitlines()[0] in said
        assert row["response"].strip() in said and row["sft_response"].strip() in said


def test_win_rates_are_those_of_counting(folder, server):
    """By a reward of one's own, and by a judge who thinks alike."""
    server.reply = prefers_more_words
    flags = ["--reward-fn", "words.py:score", "--judge-model", "m", "--judge-url", server.url]
    said = run("evaluate", "run", "tiny", *flags, cwd=folder)
    pairs = [(row["response"].split(), row["sft_response"].split()) for row in last_samples(folder)]
    wins = sum((len(a) > len(b)) + (len(a) == len(b)) / 2 for a, b in pairs)
    for name in ("reward", "judge"):
        (_, cell), _ = rows_after(f"Win rates by {name}", said)
        assert cell[:5] == f"{wins / 16:.3f}"
    words = sum(len(a) for a, _ in pairs) / 16
    assert rows_after("Means over", said)[0][1].startswith(f"{words:.3f} ±")
    assert len((folder / "runs/judge.jsonl").read_text().splitlines()) == len(server.asked)


def test_the_interval_is_wilsons():
    wins = torch.tensor([1.0] * 60 + [0.5] * 20 + [0.0] * 20)
    assert evaluate.win_rate(wins) == pytest.approx((0.7, 0.6042, 0.7811), abs=1e-4)
    assert evaluate.win_rate(torch.ones(10)) == pytest.approx((1, 0.7225, 1), abs=1e-4)


def test_no_file_named_by_a_run_alone_is_run(folder):
    """A run from elsewhere names Python files in every place where it could."""
    bad = folder / "bad"
    shutil.copytree(folder / "run", bad)
    evil = bad / "evil.py"
    evil.write_text(f"open({str(folder / 'ran')!r}, 'w')\nf = lambda x, y: [1] * len(y)\n")
    record = json.loads((folder / "run/args.json").read_text())
    named = dict.fromkeys(("reward", "reward_fn", "gold_fn"), f"{evil}:f")
    (bad / "args.json").write_text(json.dumps({**record, **named}))
    said = run("evaluate", "bad", "tiny", "--show", 1, cwd=folder)
    assert f"The run's {evil}:f is run only if you pass it as --reward-fn." in said
    assert not (folder / "ran").exists()
    run("evaluate", "bad", "--reward-fn", f"{evil}:f", cwd=folder)
    assert (folder / "ran").exists()


def test_mistakes_of_evaluate(folder):
    (folder / "half").mkdir()
    (folder / "half/args.json").write_text((folder / "run/args.json").read_text())
    shutil.copytree(ROOT / "tiny/sft", folder / "other")
    tokenizer = AutoTokenizer.from_pretrained(folder / "other")
    tokenizer.add_tokens("zebra")
    tokenizer.save_pretrained(folder / "other")
    for flags, sentence in {
        "": "name policies",
        "other tiny": "other has other tokens than the reference",
        "run/model": "pass --dataset",
        "run nowhere": "model nowhere: ",
        "half tiny": "half has no model yet: a run saves it at its end",
        "tiny --reward-fn no.py:f": "expected FILE.py:FUNCTION",
        "tiny --temperature 0": "--temperature 0.0 is too small",
    }.items():
        assert sentence in run("evaluate", *flags.split(), *SMALL, cwd=folder, code=2)


# ------------------------------------------------------------------------------------------- judge
def test_read_verdict():
    replies = {"A": "A", "**B**": "B", " tie.\n": "tie", "Both A and B are fine.": "unclear"}
    replies |= {"A is short, B is long.\n\nVerdict: B": "B", "": "unclear"}
    assert {reply: evaluate.read_verdict(reply) for reply in replies} == replies


@pytest.fixture
def server(monkeypatch):
    """A judge at server.url that answers server.reply(A, B): a text, or a status."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            shown = re.findall(r"\[Continuation [AB]\]\n(.*?)\n\n", text, re.DOTALL)
            httpd.asked.append((self.path, body["model"], *shown))
            reply = httpd.reply(*shown)
            self.send_response(reply if isinstance(reply, int) else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.asked, httpd.url = [], f"http://127.0.0.1:{httpd.server_port}/v1"
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def prefers_more_words(a, b):
    a, b = len(a.split()), len(b.split())
    return "A" if a > b else "B" if b > a else "tie"


TEXTS = [["two words", "one", "same", "x"], ["one", "two words", "same", "y"]]


def judged(server, file, **changes):
    options = {"judge_model": "m", "judge_url": server.url, "judge_replies": str(file), **changes}
    wins = evaluate.judge_wins(["p", "q", "r", "s"], TEXTS, evaluate.Args(**options))
    assert torch.equal(wins[0, 1], 1 - wins[1, 0])
    return wins[0, 1].tolist()


def test_the_judge_sees_both_orders_and_is_asked_once(server, tmp_path):
    server.reply = prefers_more_words
    file = tmp_path / "new/replies.jsonl"
    assert judged(server, file) == [1, 0, 0.5, 0.5]
    assert {row[:2] for row in server.asked} == {("/v1/chat/completions", "m")}
    asked = sorted(row[2:] for row in server.asked)  # nothing about the same answers
    pairs = [("one", "two words"), ("two words", "one")]
    assert asked == sorted([*pairs, *pairs, ("x", "y"), ("y", "x")])
    server.reply = lambda a, b: "A"  # whatever is shown first
    assert judged(server, file) == [1, 0, 0.5, 0.5] and len(server.asked) == 6
    assert judged(server, file, judge_model="other") == [0.5] * 4 and len(server.asked) == 12


def test_replies_before_a_failure_are_kept(server, tmp_path):
    server.reply = lambda a, b: 400 if "y" in (a, b) else prefers_more_words(a, b)
    file = tmp_path / "replies.jsonl"
    with pytest.raises(evaluate.UserError, match="judge m: Error code: 400.* its replies are kept"):
        judged(server, file)
    kept = len(file.read_text().splitlines())
    server.asked.clear()
    server.reply = prefers_more_words
    assert judged(server, file) == [1, 0, 0.5, 0.5]
    assert kept > 0 and len(server.asked) == 6 - kept


# -------------------------------------------------------------------------------- plot_frontier.py
def make_run(folder, points, script="p3o_v2", **changes):
    """A hand-made run: points are pairs (KL, reward), gold is their negative."""
    folder.mkdir()
    record = {"script": script, "seed": 1, "output_dir": str(folder), "dataset": "tiny"}
    record |= {"policy": "/far/tiny/sft", "reward": "/far/tiny/reward_model", "beta": 0.1}
    (folder / "args.json").write_text(json.dumps(record | changes))
    errors = {"reward_se": 0.1, "gold_se": 0.1}
    rows = [json.dumps({"kl": kl, "reward": r, "gold": -r, **errors}) for kl, r in points]
    (folder / "frontier.jsonl").write_text("\n".join(rows))
    return str(folder)


def write_limit(file, **changes):
    curve = [
        {"kl": kl, "reward": 1 + 2 * kl, "gold": 0, "trusted": kl < 1.5} for kl in (0.5, 1, 2, 5)
    ]
    best = [{"n": n, "kl": kl, "reward": n, "gold": 0} for n, kl in ((1, 0), (2, 0.2))]
    record = {"policy": "tiny/sft", "reward": "tiny/reward_model", "dataset": "tiny"}
    record |= {"ref_reward": 1.0, "ref_gold": -1.0, "curve": curve, "best_of_n": best}
    file.write_text(json.dumps(record | changes))
    return str(file)


@pytest.fixture
def runs(tmp_path):
    """Three seeds of one curve, one with a path that turns back, and another script in another place."""
    make_run(tmp_path / "a", [(0, 1), (1, 2), (3, 4)])
    make_run(tmp_path / "b", [(0, 1), (1, 3), (3, 5)], seed=2, save_every=7)
    make_run(tmp_path / "c", [(0, 1), (3, 4), (1, 4)], seed=3)
    reward = "/other/tiny/reward_model"
    make_run(tmp_path / "d", [(0, 1), (0.5, 2), (0.5, 1)], "ppo", reward=reward, gamma=1)
    return [str(tmp_path / name) for name in "abcd"]


def test_plot_frontier(runs, tmp_path):
    """In a process of its own: without torch."""
    file = write_limit(tmp_path / "limit.json")
    flags = [*runs[:3], f"{runs[3]}/frontier.jsonl", "--limit", file]
    code = f"""
import sys, runpy
sys.argv = ["plot_frontier.py", *{flags!r}, "--output", "p/f.png", "--kls", "1", "2"]
runpy.run_path({str(ROOT / "plot_frontier.py")!r}, run_name="__main__")
assert not {{"torch", "transformers", "pandas"}} & set(sys.modules)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "p/f.png").read_bytes().startswith(b"\x89PNG")
    curves = json.loads((tmp_path / "p/f.json").read_text())["curves"]
    assert list(curves) == ["P3O-V2", "PPO"]
    p3o, ppo = curves["P3O-V2"], curves["PPO"]
    assert p3o["seeds"] == [1, 2, 3]
    one = p3o["reward_at"]["1"]  # of 2, 3 and 4
    assert one["reward"] == 3 and one["high"] - 3 == pytest.approx(4.30 / 3**0.5)
    assert one["share"] == 1 and one["limit_trusted"] and one["reached"]
    two = p3o["reward_at"]["2"]  # of 3, 4 and 4
    assert two["reward"] == pytest.approx(11 / 3) and two["share"] == pytest.approx(2 / 3)
    assert not two["limit_trusted"]
    rewards = [point["reward"] for point in p3o["path"]]
    assert rewards == sorted(rewards) and p3o["path"][-1]["kl"] == 3
    assert ppo["reward_at"]["1"]["reward"] == 2 and not ppo["reward_at"]["1"]["reached"]
    assert ppo["reward_at"]["1"]["low"] == pytest.approx(2 - 0.196)  # of one run: over prompts
    rows = done.stdout.splitlines()
    assert re.split(" {2,}", rows[1]) == ["P3O-V2", "3", "3.00 ± 2.48, 100%", "3.67 ± 1.43, ≤ 67%"]
    assert re.split(" {2,}", rows[2])[2] == "2.00 ± 0.20, 50% *"
    assert rows[3].split() == ["limit", "3.00", "5.00"]


def test_gold_is_that_of_the_highest_reward(runs, tmp_path):
    """Not the highest gold, which a run does not know."""
    flags = ["--value", "gold", "--kls", 2, "--output", "g.svg"]
    run("plot_frontier", runs[0], "--limit", write_limit(tmp_path / "l.json"), *flags, cwd=tmp_path)
    (curve,) = json.loads((tmp_path / "g.json").read_text())["curves"].values()
    assert curve["reward_at"]["2"]["gold"] == -3 and "share" not in curve["reward_at"]["2"]


def test_curves_of_a_script_are_named_by_what_differs(runs, tmp_path):
    other = make_run(tmp_path / "e", [(0, 1), (2, 2)], beta=0.2, policy="sft/mine")
    run("plot_frontier", *runs[:3], other, cwd=tmp_path)
    curves = json.loads((tmp_path / "runs/frontier.json").read_text())["curves"]
    ends = ("beta 0.1, policy tiny/sft", "beta 0.2, policy sft/mine")
    assert list(curves) == [f"P3O-V2, {end}" for end in ends]


def test_mistakes_of_plot_frontier(runs, tmp_path):
    make_run(tmp_path / "twice", [(0, 1)])
    make_run(tmp_path / "hh", [(0, 1)], dataset="hh")
    make_run(tmp_path / "empty", [])
    write_limit(tmp_path / "other.json", policy="sft/mine")
    (tmp_path / "broken").mkdir()
    for name in ("args.json", "frontier.jsonl"):
        (tmp_path / "broken" / name).write_text("{")
    for flags, sentence in {
        "": "name runs",
        "a --output f.jpeg": "--output f.jpeg must end in .png, .pdf or .svg",
        "nowhere": "No such file or directory: 'nowhere/args.json'",
        "broken": "broken has a damaged file",
        "empty": "no points with kl, reward and reward",
        "a twice": "two runs of p3o_v2 have the same settings and seed",
        "a hh": "these do not compare: dataset is hh or tiny",
        "a --limit other.json": "these do not compare: policy is sft/mine or tiny/sft",
        "a --limit a/args.json": "a/args.json is no limit.json with reward",
    }.items():
        assert sentence in run("plot_frontier", *flags.split(), cwd=tmp_path, code=2)
