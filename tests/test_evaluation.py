"""evaluate.py, limit.py, plot_frontier.py: against exact values, counting and a local judge."""

import itertools
import json
import math
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from scripts import KILL, TINY, lines, refused, run, write_rows

import evaluate
import limit


# ---------------------------------------------------------------------------------------- limit.py
def test_the_limit_of_normal_rewards_is_the_exact_one_as_far_as_it_is_trusted():
    """A tilt of N(0, 1) is N(μ, 1), of KL μ²/2 and effective sample size N exp(−μ²)."""
    N, generator = 50_000, torch.Generator().manual_seed(1)
    rewards = torch.randn(8, N, dtype=torch.float64, generator=generator)
    numbers = limit.limit_numbers({"reward": rewards, "gold": -rewards})
    trusted = [row for row in numbers["curve"] if row["trusted"]]
    for row in trusted:
        assert row["ess"] >= 50 and row["kl"] < math.log(N) - 4.5
        assert row["gold"] == pytest.approx(-row["reward"])
        assert row["reward"] == pytest.approx((2 * row["kl"]) ** 0.5, rel=0.01, abs=0.01)
        if row["kl"] < 1:
            assert row["ess"] == pytest.approx(N * math.exp(-2 * row["kl"]), rel=0.05)
        assert abs(row["more_than_half"]) < 0.01
    assert trusted[-1]["kl"] > 2
    few = limit.limit_numbers({"reward": rewards[:, :128]})["curve"]
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


def test_a_killed_limit_goes_on_unless_model_or_reward_have_changed(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def f(prompts, responses):\n    return [len(y) for y in responses]\n")
    options = {"eval_prompts": 4, "max_response_tokens": 8, "reward_fn": f"{file}:f"}

    def make(folder, num_samples, **changes):
        args = limit.Args(output_dir=str(folder), num_samples=num_samples, **options | changes)
        limit.main(args)
        numbers = json.loads((folder / "limit.json").read_text())
        del numbers["output_dir"]
        return numbers, torch.load(folder / "samples.pt")["values"]["reward"]

    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    second_save = (f"os.path.exists('a/samples.pt') and {KILL}", "os.rename", "samples.part")
    run("limit", *flags, "--output-dir", "a", cwd=tmp_path, disturb=second_save, code=-9)
    before = torch.load(tmp_path / "a/samples.pt")["values"]["reward"]
    numbers, rewards = make(tmp_path / "a", 44)  # rounded up
    whole, all_rewards = make(tmp_path / "b", 48)
    assert torch.equal(rewards, all_rewards) and torch.equal(rewards[:, :16], before)
    assert numbers == whole and not torch.equal(before, rewards[:, 16:32])
    assert whole["best_of_n"][0]["gold"] == pytest.approx(whole["ref_gold"])
    with pytest.raises(limit.UserError, match="temperature"):
        make(tmp_path / "b", 48, temperature=0.7)
    file.write_text(file.read_text().replace("len", "-len"))
    with pytest.raises(limit.UserError, match="samples.pt"):
        make(tmp_path / "b", 48)


def make_run(folder, points, script="p3o_v2", **changes):
    """points are pairs (KL, reward); gold is the negative reward."""
    record = {"script": script, "seed": 1, "output_dir": str(folder), "dataset": "tiny"}
    record |= {"policy": "/far/tiny/sft", "reward": "/far/tiny/reward_model", "beta": 0.1}
    errors = {"reward_se": 0.1, "gold_se": 0.1}
    rows = [{"kl": kl, "reward": r, "gold": -r, **errors} for kl, r in points]
    write_rows(folder / "frontier.jsonl", rows)
    (folder / "args.json").write_text(json.dumps(record | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of p3o_v2.py whose settings are not the defaults; a, b, c: three seeds of one curve."""
    folder = tmp_path_factory.mktemp("runs")
    sizes = "--num-updates 2 --prompts-per-update 8 --minibatch-size 4 --num-epochs 2 --seed 2"
    sizes += " --max-response-tokens 32 --eval-prompts 16 --learning-rate 1e-3 --output-dir run"
    run("p3o_v2", *sizes.split(), cwd=folder)
    make_run(folder / "a", [(0, 1), (1, 2), (3, 4)])
    make_run(folder / "b", [(0, 1), (1, 3), (3, 5)], seed=2, save_every=7)
    make_run(folder / "c", [(0, 1), (3, 4), (1, 4)], seed=3)  # turns back
    make_run(folder / "ppo", [(0, 1), (0.5, 2), (0.5, 1)], "ppo", reward="tiny/reward_model")
    make_run(folder / "sibling", [(0, 1), (2, 2)], beta=0.2, policy="sft/mine")
    make_run(folder / "twice", [(0, 1)])
    make_run(folder / "hh", [(0, 1)], dataset="hh")
    columns = ((0.5, 2, True), (1, 3, True), (2, 5, False), (5, 11, False))
    curve = [dict(zip(("kl", "reward", "trusted"), column)) for column in columns]
    record = {"policy": "tiny/sft", "reward": "tiny/reward_model", "dataset": "tiny"}
    record |= {"ref_reward": 1.0, "curve": curve, "best_of_n": [{"kl": 0, "reward": 1}]}
    (folder / "limit.json").write_text(json.dumps(record))
    shutil.copytree(TINY / "sft", folder / "larger")
    tokenizer = folder / "larger/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|padding|>", "<|other|>"))
    return folder


MISTAKES = [  # script, flags, what the sentence names
    ("evaluate", "run/model", "--dataset"),
    ("evaluate", "larger tiny", "larger"),
    ("evaluate", "tiny --temperature 0", "--temperature"),
    ("limit", "--temperature 0", "--temperature"),
    ("plot_frontier", "a --output f.jpeg", "--output f.jpeg"),
    ("plot_frontier", "a twice", "seed"),
    ("plot_frontier", "a hh", "dataset"),
    ("plot_frontier", "sibling --limit limit.json", "policy"),
]


@pytest.mark.parametrize("script, flags, named", MISTAKES)
def test_a_mistake_is_told_in_a_sentence(script, flags, named, folder):
    assert named in refused(script, *flags.split(), cwd=folder)


# -------------------------------------------------------------------------------- plot_frontier.py
def test_plotted_numbers_are_those_computed_by_hand(folder):
    names = ["a", "b", "c", "ppo/frontier.jsonl", "--limit", "limit.json"]
    said = run("plot_frontier", *names, "--kls", 1, 2, "--output", "p/f.png", cwd=folder)
    assert (folder / "p/f.png").read_bytes().startswith(b"\x89PNG")
    # Of 2, 3 and 4, by Student's t; of 3, 4 and 4; of one run, over its prompts
    rows = [re.split(" {2,}", row) for row in said.splitlines()]
    assert rows[1] == ["P3O-V2", "3", "3.00 ± 2.48, 100%", "3.67 ± 1.43, ≤ 67%"]
    assert rows[2][:3] == ["PPO", "1", "2.00 ± 0.20, 50% *"]
    assert rows[3] == ["limit", "3.00", "5.00"]


def test_gold_is_that_of_the_highest_reward_and_curves_are_named_by_what_differs(folder):
    flags = "a b c sibling --value gold --kls 2 --output g.svg"
    run("plot_frontier", *flags.split(), cwd=folder)
    curves = json.loads((folder / "g.json").read_text())["curves"]
    ends = ("beta 0.1, policy tiny/sft", "beta 0.2, policy sft/mine")
    assert list(curves) == [f"P3O-V2, {end}" for end in ends]
    values = [curve["reward_at"]["2"]["gold"] for curve in curves.values()]
    assert values == pytest.approx([-11 / 3, -2])  # not the highest gold, which no run knows


# ------------------------------------------------------------------------------------- evaluate.py
@pytest.fixture
def server():
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

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.asked, httpd.url = [], f"http://127.0.0.1:{httpd.server_port}/v1"
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield httpd
        httpd.shutdown()


def prefers_more_words(a, b):
    a, b = len(a.split()), len(b.split())
    return "A" if a > b else "Not A.\n\n**B**." if b > a else "tie"


def test_a_run_is_evaluated_as_it_was_in_training_and_judged_by_counting(folder, server):
    """The same prompts, answers, reward and reference; as a run and as a model it ties."""
    server.reply = prefers_more_words
    judge = ["--judge-model", "m", "--judge-url", server.url]
    said = run("evaluate", "run", "tiny", "run/model", "--show", 3, *judge, cwd=folder)

    def cells(title):  # of a printed table; they are two spaces apart or more
        rows = said.partition(title)[2].partition("\n\n")[0].splitlines()[2:]
        return [re.split(r" {2,}", row.strip()) for row in rows]

    last = lines(folder / "run/frontier.jsonl")[-1]
    keys = ("reward", "gold", "kl", "length", "eos_rate")
    expected = [f"{last[key]:.3f} ± {last[f'{key}_se']:.3f}" for key in keys]
    means = cells("Means over 16 prompts")
    assert means[0] == ["1 run", *expected] and means[2] == ["3 run/model", *expected]
    assert last["kl"] > 0.01 and means[1][3] == "0.000 ± 0.000"
    answers = [row for row in lines(folder / "run/samples.jsonl") if row["step"] == 2]
    words = [[len(row[key].split()) for key in ("response", "sft_response")] for row in answers]
    wins = sum((a > b) + (a == b) / 2 for a, b in words)
    for name, rate in (("reward", last["win_rate_vs_sft"]), ("judge", wins / 16)):
        found = cells(f"Win rates by {name}")
        assert found[0][1].startswith(f"{rate:.3f} [")
        assert found[0][2][:5] == found[2][1][:5] == "0.500"
        assert float(found[0][1][:5]) + float(found[1][1][:5]) == pytest.approx(1)
    for row in answers[:15:5]:  # three of 16
        assert row["prompt"].strip().splitlines()[0] in said
        assert row["response"].strip() in said and row["sft_response"].strip() in said


def test_the_interval_is_wilsons():
    wins = torch.tensor([1.0] * 60 + [0.5] * 20 + [0.0] * 20)
    assert evaluate.win_rate(wins) == pytest.approx((0.7, 0.6042, 0.7811), abs=1e-4)
    assert evaluate.win_rate(torch.ones(10)) == pytest.approx((1, 0.7225, 1), abs=1e-4)


def test_no_file_named_by_a_run_alone_is_run(folder):
    """A run from elsewhere names Python files in every place where it could."""
    bad = shutil.copytree(folder / "run", folder / "bad")
    evil = bad / "evil.py"
    evil.write_text(f"open({str(folder / 'ran')!r}, 'w')\nf = lambda x, y: [1] * len(y)\n")
    record = json.loads((bad / "args.json").read_text())
    record |= dict.fromkeys(("reward", "reward_fn", "gold_fn"), f"{evil}:f")
    (bad / "args.json").write_text(json.dumps(record))
    run("evaluate", "bad", "tiny", cwd=folder)
    assert not (folder / "ran").exists()
    run("evaluate", "bad", "--reward-fn", f"{evil}:f", cwd=folder)
    assert (folder / "ran").exists()


def test_the_judge_sees_both_orders_once_and_its_replies_are_kept_when_it_fails(server, tmp_path):
    file = tmp_path / "new/replies.jsonl"
    texts = [["two words", "one", "same", "x"], ["one", "two words", "same", "y"]]

    def judged(**changes):
        options = {"judge_model": "m", "judge_url": server.url, "judge_replies": str(file)}
        args = evaluate.Args(**options | changes)
        wins = evaluate.judge_wins(["p", "q", "r", "s"], texts, args)
        assert torch.equal(wins[0, 1], 1 - wins[1, 0])
        return wins[0, 1].tolist()

    server.reply = lambda a, b: 400 if "y" in (a, b) else prefers_more_words(a, b)
    with pytest.raises(evaluate.UserError, match="judge m: Error code: 400"):
        judged()
    kept = len(lines(file))
    server.asked.clear()
    server.reply = prefers_more_words
    assert judged() == [1, 0, 0.5, 0.5] and len(server.asked) == 6 - kept < 6
    server.asked.clear()
    server.reply = lambda a, b: "Both A and B are fine." if a == "x" else "A"
    assert judged() == [1, 0, 0.5, 0.5] and not server.asked
    assert judged(judge_model="other") == [0.5, 0.5, 0.5, 0.25]
    pairs = [("one", "two words"), ("two words", "one")] * 2  # nothing about the same answers
    expected = [("/v1/chat/completions", "other", *pair) for pair in (*pairs, "xy", "yx")]
    assert sorted(server.asked) == sorted(expected)
