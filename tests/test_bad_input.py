"""Bad input: refused before anything starts (exit code 2), handled and counted (0), or the end of a run, whose last
checkpoint is kept (1). Whichever it is, one sentence tells it and no traceback is shown."""

import copy
import json
import math
import re
import shutil
from collections import deque
from pathlib import Path

import pytest
import torch
from conftest import Script, run
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
)

ROOT = Path(__file__).parent.parent
AHEAD = 4  # scripts that run at the same time
TINY_REWARD = f"--reward-model {ROOT}/tiny/reward_model"
SMALL = {
    "p3o_v2": "--num-updates 2 --prompts-per-update 8 --minibatch-size 4 --num-epochs 1 --max-response-tokens 16 "
    "--eval-every 0 --eval-prompts 4",
    "sft": "--num-updates 2 --minibatch-size 4 --eval-prompts 4",
    "reward_model": "--num-updates 2 --minibatch-size 4 --eval-prompts 4",
}

# Reward functions that go wrong from the first call of update 2 on, until there is a file "mended".
REWARDS = """
import json
import os

calls, culprit = 0, []


def bad(of_batch=lambda rewards: rewards, of_culprit=lambda: 0.0):
    def f(prompts, responses):
        global calls
        calls += 1
        rewards, rows = [len(y) / 10 for y in responses], [[x, y] for x, y in zip(prompts, responses)]
        if calls < 4 or os.path.exists("mended"):
            return rewards
        if not culprit:
            culprit.extend(sorted(rows)[-1])
            with open("culprit.json", "w") as file:
                json.dump(culprit, file)
        return of_batch([of_culprit() if row == culprit else reward for row, reward in zip(rows, rewards)])

    return f


def fine(prompts, responses):
    return [len(y) / 10 for y in responses]


fewer = bad(lambda rewards: rewards[1:])
one = bad(lambda rewards: [0.0])
nothing = bad(lambda rewards: None)
number = bad(lambda rewards: 0.5)
text = bad(of_culprit=lambda: "good")
none = bad(of_culprit=lambda: None)
nan = bad(of_culprit=lambda: float("nan"))
raises = bad(of_culprit=lambda: 1 / 0)
exits = bad(of_culprit=lambda: exit(0))
value = 3
"""


def lines(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def a_row(number, **changes):
    prompt = f"\n\nHuman: How can I water a cactus? Say {number}.\n\nAssistant:"
    return {
        "prompt": prompt,
        "completion": " Okay.",
        "chosen": " Okay. Fine.",
        "rejected": " Not this.",
    } | changes


def a_dialogue(row):
    return {key: row["prompt"] + row[key] for key in ("chosen", "rejected")}


def write_data(folder):
    rows = [a_row(i) for i in range(24)]
    files = {
        "ok": rows,
        "few": rows[:8],
        "misnamed": [{"question": "What?", "answer": "That."}],
        "missing": [*rows[:2], {"answer": "That."}],
        "null": [*rows[:2], a_row(2, prompt=None)],
        "null_response": [*rows[:2], a_row(2, completion=None, chosen=None)],
        "number": [*rows[:2], a_row(2, prompt=7)],
        "number_response": [*rows[:2], a_row(2, completion=7, rejected=7)],
        "list": [*rows[:2], a_row(2, prompt=["Hi", "there"])],
        "one_row": rows[:1],
        "no_prompts": [a_row(i, prompt="") for i in range(8)],
        "no_responses": [a_row(i, completion=" ", rejected="") for i in range(8)],
        "equal": [a_row(i, rejected=" Okay. Fine.") for i in range(8)],
        "no_common_prompt": [{"chosen": "Hi.", "rejected": "Ho."}] * 8,
        "dates": [{"prompt": f"2020-01-{day:02}"} for day in range(1, 25)],
        "one_held_out/test": rows[:1],
        "one_held_out/train": rows[1:],
        "counted/test": rows[:8],
        "counted/train": [
            *rows[8:],
            a_row(1, prompt=""),
            a_row(2, prompt="", completion=""),
            a_row(3, prompt=" \n"),
            a_row(33, completion=" ", chosen=" "),
            a_row(34, rejected=" Okay. Fine."),
            a_row(35, prompt=rows[0]["prompt"] * 4),
            a_row(36, completion=" Okay." * 100, chosen=" Okay." * 100),
            rows[0],
        ],
        "dialogues/test": map(a_dialogue, rows[:8]),
        "dialogues/train": [
            *map(a_dialogue, rows[8:]),
            *[{"chosen": f"{i}.", "rejected": "No."} for i in range(3)],
        ],
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text(jsonl(*content))
    start = jsonl(*rows[:2])
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text(start + '{"prompt": "Hi"\n' + start)
    (folder / "array.jsonl").write_text(start + '[["prompt", "Hi"]]\n')
    (folder / "bare.jsonl").write_text(start + "7\n")
    (folder / "blank_then_broken.jsonl").write_text(f"\n{start}\n{{\n")
    (folder / "latin.jsonl").write_bytes(jsonl(rows[0]).replace("Say", "Né").encode("latin-1"))
    (folder / "not_zipped.jsonl.gz").write_text(start)
    (folder / "no.parquet").write_text(start)
    (folder / "blank_lines.jsonl").write_text("\n" + jsonl(*rows).replace("\n", "\n\n") + "  \n")
    (folder / "empty_folder").mkdir()
    (folder / "full").mkdir()
    (folder / "full/notes.txt").write_text("mine")
    (folder / "file").write_text("mine")
    codes = {
        "raises": "1 / 0",
        "imports": "import nothing_of_this_name",
        "syntax": "def f(:",
        "exits": "raise SystemExit",
    }
    for name, code in codes.items():
        (folder / f"{name}.py").write_text(code + "\n")
    (folder / "rewards.py").write_text(REWARDS)


def write_models(folder):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/sft")
    policy = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/sft", dtype=torch.float32)
    scorer = AutoModelForSequenceClassification.from_pretrained(
        ROOT / "tiny/reward_model", dtype=torch.float32
    )

    def save(name, model=policy, tokenizer=tokenizer):
        model.save_pretrained(folder / name)
        if tokenizer:
            tokenizer.save_pretrained(folder / name)

    larger, no_end, no_pad = (copy.deepcopy(tokenizer) for _ in range(3))
    larger.add_tokens(["<one>", "<more>"])
    save("larger_tokenizer", tokenizer=larger)
    save("no_tokenizer", tokenizer=None)
    no_end.eos_token = None
    save("no_end", tokenizer=no_end)
    model, no_pad.pad_token = copy.deepcopy(policy), None
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    save("no_pad", model, no_pad)

    model = copy.deepcopy(
        policy
    )  # with ids that the tokenizer does not know, which are sampled all the same
    model.resize_token_embeddings(800)
    words = model.get_input_embeddings().weight.data
    words[768:] = words[tokenizer(" the").input_ids]
    save("padded", model)

    model = copy.deepcopy(policy)
    model.base_model.layers[1].mlp.dense_h_to_4h.weight.data[0, 0] = math.nan
    save("nan", model)

    for name, changes in {
        "two_outputs": {"num_labels": 2},
        "small_vocabulary": {"num_labels": 1, "vocab_size": 99},
    }.items():
        save(
            name,
            GPTNeoXForSequenceClassification(
                GPTNeoXConfig.from_pretrained(ROOT / "tiny/sft", **changes)
            ),
        )
    save("scorer", scorer)
    model = copy.deepcopy(scorer)
    model.score.weight.data[0, 3] = math.nan
    save("nan_scorer", model)
    model = copy.deepcopy(scorer)
    model.get_input_embeddings().weight.data[tokenizer(" jam").input_ids] = math.nan
    save("nan_for_jam", model)

    shutil.copytree(folder / "scorer", folder / "cut_short")
    weights = (folder / "cut_short/model.safetensors").read_bytes()
    (folder / "cut_short/model.safetensors").write_bytes(weights[: len(weights) // 2])
    records = {
        "evil": '{"base_name": "../../evil"}',
        "dots": '{"base_name": ".."}',
        "not_ours": '{"base_name": 7}',
    }
    for name, record in {**records, "array": "[1]", "broken": "{"}.items():
        shutil.copytree(ROOT / "tiny/sft", folder / f"record_{name}/model")
        (folder / f"record_{name}/args.json").write_text(record)


def snapshot(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_data(folder)
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def outcome(request, inputs, tmp_path_factory):
    """case -> (exit code, output, folder where it ran, which holds `inputs` as "in"); the next run in the meantime."""
    items = (
        item
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    )
    cases = (item.callspec.params.get("case") for item in items)
    waiting, running = deque(case for case in cases if case), {}

    def outcome(case):
        while waiting and (len(running) < AHEAD or case not in running):
            script, flags, *_ = waiting[0]
            folder = tmp_path_factory.mktemp("case")
            (folder / "in").symlink_to(inputs)
            dataset = "" if "--dataset" in flags else "--dataset in/ok.jsonl"
            running[waiting.popleft()] = (
                Script(script, *f"{SMALL[script]} {dataset} {flags}".split(), cwd=folder),
                folder,
            )
        script, folder = running.pop(case)
        return *script.wait(), folder

    return outcome


def named(case):
    return " ".join(case[:2]).replace(str(ROOT), ".")


EVERY = ("p3o_v2", "sft", "reward_model")
LATER = ("sft", "reward_model")
COLUMNS = {
    "p3o_v2": "chosen",
    "sft": "completion",
    "reward_model": "chosen",
}  # the first that is missed

EMPTY = "dropped: empty prompt or response, or no prompt in common"
ROW = "row 3 of train: ValueError: expected text or messages in"
REFUSED = [
    # what is not there, or cannot be read
    *[
        (script, "--model no/such-model", "--model no/such-model: no model is there")
        for script in EVERY
    ],
    ("p3o_v2", "--model in/file", "--model in/file: no model can be read from there"),
    ("sft", "--model in/empty_folder", "--model in/empty_folder: no model can be read from there"),
    (
        "reward_model",
        "--model in/cut_short",
        "--model in/cut_short: no model can be read from there",
    ),
    *[
        (script, "--dataset no/such-data", "--dataset no/such-data: no dataset is there")
        for script in EVERY
    ],
    ("sft", "--dataset nothing.jsonl", "--dataset nothing.jsonl: no dataset is there"),
    (
        "p3o_v2",
        "--dataset in/empty_folder",
        "--dataset in/empty_folder: no dataset can be read from there",
    ),
    ("p3o_v2", "--dataset in/not_zipped.jsonl.gz", "Not a gzipped file"),
    (
        "sft",
        "--dataset in/no.parquet",
        "--dataset in/no.parquet: no dataset can be read from there",
    ),
    (
        "p3o_v2",
        "--dataset in/latin.jsonl",
        "in/latin.jsonl: no dataset can be read from there (UnicodeDecodeError",
    ),
    ("reward_model", "--dataset in/latin.jsonl", "'utf-8' codec can't decode byte 0xe9"),
    # datasets
    *[
        (
            script,
            "--dataset in/empty.jsonl",
            re.compile(r"--dataset in/empty\.jsonl: .*(empty|no rows|no lines)"),
        )
        for script in EVERY
    ],
    *[
        (
            script,
            "--dataset in/broken.jsonl",
            "--dataset in/broken.jsonl: row 3 of train: JSONDecodeError: ",
        )
        for script in EVERY
    ],
    (
        "p3o_v2",
        "--dataset in/array.jsonl",
        "in/array.jsonl: row 3 of train: TypeError: 'list' object is not a mapping",
    ),
    (
        "sft",
        "--dataset in/bare.jsonl",
        "in/bare.jsonl: row 3 of train: TypeError: 'int' object is not a mapping",
    ),
    ("sft", "--dataset in/blank_then_broken.jsonl", "row 5 of train: JSONDecodeError: "),
    *[
        (
            s,
            "--dataset in/misnamed.jsonl",
            f"messages in {COLUMNS[s]}; found None (columns: question, answer)",
        )
        for s in EVERY
    ],
    *[
        (s, "--dataset in/missing.jsonl", f"{ROW} {COLUMNS[s]}; found None (columns: answer)")
        for s in EVERY
    ],
    *[(s, "--dataset in/null.jsonl", f"{ROW} prompt; found None") for s in EVERY],
    *[(s, "--dataset in/number.jsonl", f"{ROW} prompt; found 7") for s in EVERY],
    ("p3o_v2", "--dataset in/list.jsonl", f"{ROW} prompt; found ['Hi', 'there']"),
    ("sft", "--dataset in/null_response.jsonl", f"{ROW} completion; found None"),
    ("sft", "--dataset in/number_response.jsonl", "; found 7"),
    ("reward_model", "--dataset in/number_response.jsonl", f"{ROW} rejected; found 7"),
    *[
        (
            s,
            "--dataset in/misnamed.jsonl --map prompt=answers",
            "--map prompt=answers: the columns are question, answer",
        )
        for s in EVERY
    ],
    (
        "p3o_v2",
        "--dataset in/misnamed.jsonl --map prompt",
        "--map prompt=: the columns are question, answer",
    ),
    # nothing left
    (
        "p3o_v2",
        "--dataset in/no_prompts.jsonl",
        "--dataset in/no_prompts.jsonl: no train prompts are left",
    ),
    ("p3o_v2", "--max-prompt-tokens 1", "no train prompts are left"),
    *[
        ("p3o_v2", f"--dataset in/{x}.jsonl", "no train prompts are left")
        for x in ("one_row", "no_common_prompt")
    ],
    *[
        (script, "--dataset in/one_row.jsonl", "--dataset in/one_row.jsonl: no train rows are left")
        for script in LATER
    ],
    *[(s, "--dataset in/no_common_prompt.jsonl", f"8 {EMPTY}") for s in LATER],
    ("sft", "--dataset in/no_responses.jsonl", f"6 {EMPTY}"),  # of 8, two are held out
    ("sft", "--max-prompt-tokens 2", "no train rows are left; see the counts above"),
    ("reward_model", "--dataset in/equal.jsonl", "6 dropped: chosen and rejected are equal"),
    # models that do not fit
    *[
        (s, "--model in/larger_tokenizer", "its tokenizer has 770 tokens, its embeddings 768")
        for s in LATER
    ],
    (
        "p3o_v2",
        f"--model in/larger_tokenizer {TINY_REWARD}",
        "its tokenizer has 770 tokens, its embeddings 768",
    ),
    *[
        (s, "--model in/no_tokenizer", re.compile("--model in/no_tokenizer: .*tokenizer"))
        for s in LATER
    ],
    (
        "p3o_v2",
        f"--model in/no_tokenizer {TINY_REWARD}",
        re.compile("--model in/no_tokenizer: .*tokenizer"),
    ),
    *[(s, "--model in/no_end", "its tokenizer has no end-of-sequence token") for s in LATER],
    ("p3o_v2", "--reward-model no/such-model", "--reward-model no/such-model: no model is there"),
    (
        "p3o_v2",
        "--reward-model in/cut_short",
        "--reward-model in/cut_short: no model can be read from there",
    ),
    (
        "p3o_v2",
        f"--reward-model {ROOT}/tiny/sft",
        "tiny/sft: it is no ModelForSequenceClassification, it lacks",
    ),
    (
        "p3o_v2",
        "--reward-model in/two_outputs",
        "expected a score and the policy's 768 tokens, found 2 and 768",
    ),
    (
        "p3o_v2",
        "--reward-model in/small_vocabulary",
        re.compile("--reward-model in/small_vocabulary: .*99"),
    ),
    ("p3o_v2", "--model in/scorer", "no reward: run reward_model.py on in/ok.jsonl"),
    # reward functions
    ("p3o_v2", "--reward-fn nothing.py:f", "--reward-fn nothing.py:f: expected FILE.py:FUNCTION"),
    ("p3o_v2", "--reward-fn in/rewards.py", "expected FILE.py:FUNCTION; :FUNCTION is missing"),
    ("p3o_v2", "--reward-fn in/rewards.py:other", "expected FILE.py:FUNCTION; not found"),
    (
        "p3o_v2",
        "--reward-fn in/rewards.py:value",
        "--reward-fn in/rewards.py:value: expected FILE.py:FUNCTION",
    ),
    ("p3o_v2", "--gold-fn nothing.py:f", "--gold-fn nothing.py:f: expected FILE.py:FUNCTION"),
    (
        "p3o_v2",
        "--reward-fn in/raises.py:f",
        re.compile("--reward-fn in/raises.py:f: .*division by zero"),
    ),
    (
        "p3o_v2",
        "--reward-fn in/syntax.py:f",
        re.compile("--reward-fn in/syntax.py:f: .*invalid syntax"),
    ),
    (
        "p3o_v2",
        "--reward-fn in/imports.py:f",
        re.compile("--reward-fn in/imports.py:f: .*No module named 'nothing_of_this_name'"),
    ),
    ("p3o_v2", "--reward-fn in/exits.py:f", re.compile("--reward-fn in/exits.py:f: .*SystemExit")),
    ("p3o_v2", "--reward-fn in/latin.jsonl:f", "--reward-fn in/latin.jsonl:f: "),
    # numbers
    (
        "p3o_v2",
        "--prompts-per-update 10",
        "--prompts-per-update 10: expected a multiple of --minibatch-size 4",
    ),
    ("p3o_v2", "--num-epochs 0", "--num-epochs 0: expected at least 1"),
    ("p3o_v2", "--micro-batch-size -1", "--micro-batch-size -1: expected at least 1"),
    ("p3o_v2", "--learning-rate -1", "--learning-rate -1.0: expected at least 0"),
    ("p3o_v2", "--learning-rate inf", re.compile("--learning-rate inf: .*(below|finite)")),
    ("p3o_v2", "--temperature 0", "--temperature 0.0: expected at least 0.001"),
    ("p3o_v2", "--clip-range nan", "--clip-range nan: expected"),
    ("p3o_v2", "--adam-betas 0.9 1.0", "--adam-betas (0.9, 1.0): expected at least 0, below 1"),
    ("p3o_v2", "--ratio-bound 0.5", "--ratio-bound 0.5: expected at least 1"),
    ("p3o_v2", "--beta -1", "--beta -1.0: expected at least 0"),
    ("p3o_v2", "--eval-prompts 1", "--eval-prompts 1: expected at least 2"),
    ("p3o_v2", "--max-response-tokens 0", "--max-response-tokens 0: expected at least 1"),
    (
        "p3o_v2",
        "--num-responses 1",
        "--num-responses 1: P3O compares responses to a prompt, at least 2",
    ),
    ("p3o_v2", "--unfrozen-layers 99", "--unfrozen-layers 99: the model has 4"),
    ("p3o_v2", "--num-updates -1", "--num-updates -1: expected at least 0"),
    *[
        (script, "--minibatch-size 0", "--minibatch-size 0: expected at least 1")
        for script in EVERY
    ],
    *[(script, "--seed -1", "--seed -1: expected at least 0") for script in EVERY],
    *[(s, "--seed 99999999999999999999", "--seed 99999999999999999999: expected") for s in EVERY],
    (
        "p3o_v2",
        "--micro-batch-size 99999999999999999999",
        "--micro-batch-size 99999999999999999999: expected",
    ),
    ("sft", "--data-epochs -1", "--data-epochs -1: expected at least 0"),
    ("sft", "--max-prompt-tokens 0", "--max-prompt-tokens 0: expected at least 1"),
    ("sft", "--max-grad-norm nan", "--max-grad-norm nan: expected at least 0"),
    ("reward_model", "--warmup-updates -1", "--warmup-updates -1: expected at least 0"),
    ("reward_model", "--unfrozen-layers 5", "--unfrozen-layers 5: the model has 4"),
    # flags, which are tyro's to refuse
    ("p3o_v2", "--dtype float16", "float16"),
    ("sft", "--lr-schedule step", "--lr-schedule"),
    *[(script, "--no-such-flag", "Unrecognized options: --no-such-flag") for script in EVERY],
    ("p3o_v2", "--beta", "Missing value for argument '--beta'"),
    ("p3o_v2", "--beta big", "--beta"),
    ("reward_model", "--num-updates 1.5", "--num-updates"),
    # run folders
    *[
        (script, "--output-dir in/file", "in/file: nothing can be written there")
        for script in EVERY
    ],
    *[
        (
            script,
            "--output-dir in/file/run",
            "--output-dir in/file/run: nothing can be written there",
        )
        for script in EVERY
    ],
    *[
        (script, "--output-dir in/full", "in/full holds files already, and no run")
        for script in EVERY
    ],
    ("sft", "--output-dir in/full --overwrite", "in/full holds files already, and no run"),
    ("sft", "--output-dir in/full --resume", "in/full holds files already, and no run"),
]
if not torch.cuda.is_available():
    REFUSED += [(script, "--device cuda", "--device cuda: torch finds no GPU") for script in EVERY]


@pytest.mark.parametrize("case", REFUSED, ids=named)
def test_refused_before_anything_starts(case, outcome, inputs):
    before = snapshot(inputs)
    code, said, folder = outcome(case)
    assert code == 2, said
    assert "Traceback" not in said
    told = " ".join(said.replace("│", " ").split())
    assert case[2] in told if isinstance(case[2], str) else case[2].search(told), said
    assert "--resume goes on" not in said
    assert [path.name for path in folder.iterdir()] == ["in"]
    assert snapshot(inputs) == before


# A held-out split of 8 rows; in training 16 good rows, and some to count.
COUNTED = "--dataset in/counted --max-prompt-tokens 40 --max-response-tokens 32"
DIALOGUES = "--dataset in/dialogues --max-response-tokens 16"
HANDLED = [
    (
        "sft",
        COUNTED,
        "18 train rows",
        "4 dropped: empty prompt or response",
        "1 dropped: prompt of more than 40 tokens",
    )
    + ("1 cut: response of more than 32 tokens", "8 held-out rows"),
    (
        "sft",
        f"{COUNTED} --truncate-prompts",
        "19 train rows",
        "1 cut: prompt of more than 40 tokens",
    ),
    (
        "reward_model",
        COUNTED,
        "17 train rows",
        "4 dropped: empty prompt or response",
        "8 held-out rows",
    )
    + ("1 dropped: chosen and rejected are equal", "1 cut: response of more than 32 tokens"),
    (
        "reward_model",
        f"{COUNTED} --truncate-prompts",
        "18 train rows",
        "1 cut: prompt of more than 40 tokens",
    ),
    ("p3o_v2", COUNTED, "1 train rows dropped: their prompts are held out")
    + ("19 different train prompts; 1 too long, dropped; 3 empty, dropped",),
    (
        "p3o_v2",
        f"{COUNTED} --truncate-prompts",
        "20 different train prompts; 1 too long, cut on the left",
    ),
    *[(s, DIALOGUES, f"16 train rows; 3 {EMPTY}") for s in LATER],
    ("p3o_v2", DIALOGUES, "16 different train prompts; 0 too long, dropped; 3 empty, dropped"),
    ("sft", "--dataset in/blank_lines.jsonl", "22 train rows", "2 held-out rows"),
    (
        "p3o_v2",
        "--dataset in/blank_lines.jsonl",
        "22 different train prompts",
        "2 different held-out prompts",
    ),
    ("p3o_v2", "--dataset in/few.jsonl", "different held-out prompts"),
    (
        "p3o_v2",
        "--dataset in/one_held_out",
        "1 different held-out prompts",
    ),  # then there are no standard errors
    *[
        (s, f"--model in/{name}", f"(from --model in/{name})")
        for s in ["sft"]
        for name in ("no_pad", "padded")
    ],
    *[("reward_model", f"--model in/{name}", "no SFT run") for name in ("no_pad", "padded")],
    ("p3o_v2", f"--model in/no_pad {TINY_REWARD}", "in/no_pad (no SFT run for it)"),
    (
        "p3o_v2",
        "--model in/padded --reward-fn in/rewards.py:fine",
        "policy in/padded",
    ),
]


@pytest.mark.parametrize("case", HANDLED, ids=named)
def test_handled_and_counted(case, outcome):
    (code, said, folder), (script, _, *sentences) = outcome(case), case
    assert code == 0, said
    assert "Traceback" not in said and "Warning" not in said
    told = " ".join(said.split())
    assert [sentence for sentence in sentences if sentence not in told] == [], said
    (model,) = folder.glob(f"runs/{script}/*/*/model")
    for file in (
        model.parent.glob("*s.jsonl") if script == "sft" else model.parent.glob("[mef]*[srn].jsonl")
    ):
        assert all(math.isfinite(value) for row in lines(file) for value in row.values()), file


def test_text_that_looks_like_a_date_stays_as_it_is(inputs, tmp_path):
    from p3o_v2 import Args, read_dataset

    days = {f"2020-01-{day:02}" for day in range(1, 25)}
    (tmp_path / "folder").mkdir()
    shutil.copy(inputs / "dates.jsonl", tmp_path / "folder/train.jsonl")
    for dataset in (inputs / "dates.jsonl", tmp_path / "folder"):
        parts = read_dataset(None, Args(dataset=str(dataset)), ())
        assert {prompt for rows in parts for (prompt,) in rows} == days
    run("p3o_v2", *SMALL["p3o_v2"].split(), "--dataset", inputs / "dates.jsonl", cwd=tmp_path)
    first, *_ = lines(tmp_path / "runs/p3o_v2/dates/tiny/samples.jsonl")
    assert first["prompts"] and {*first["prompts"]} <= days


LONGER = "--num-updates 3 --save-every 1"
NUMBERS = r"expected \d+ finite numbers?, found "
STOPPED = [
    # flags of a p3o_v2 run, what the sentence says, whether it holds the culprit's prompt and response
    ("p3o_v2", f"{LONGER} --reward-fn in/rewards.py:one", f"{NUMBERS}.*0.0", False),
    ("p3o_v2", f"{LONGER} --reward-fn in/rewards.py:fewer", f"{NUMBERS}31: ", False),
    ("p3o_v2", f"{LONGER} --reward-fn in/rewards.py:nothing", f"{NUMBERS}no list: None", False),
    ("p3o_v2", f"{LONGER} --reward-fn in/rewards.py:number", f"{NUMBERS}no list: 0.5", False),
    ("p3o_v2", f"{LONGER} --reward-fn in/rewards.py:text", f"{NUMBERS}.*good", True),
    ("p3o_v2", f"{LONGER} --reward-fn in/rewards.py:none", f"{NUMBERS}.*None", True),
    ("p3o_v2", f"{LONGER} --reward-fn in/rewards.py:nan", f"{NUMBERS}.*nan", True),
    (
        "p3o_v2",
        f"{LONGER} --reward-fn in/rewards.py:raises",
        r"ZeroDivisionError\('division by zero'\)",
        True,
    ),
    ("p3o_v2", f"{LONGER} --reward-fn in/rewards.py:exits", "SystemExit", True),
]


@pytest.mark.parametrize("case", STOPPED, ids=named)
def test_reward_function_that_goes_wrong(case, outcome):
    (code, said, folder), (script, flags, sentence, is_culprit_told) = outcome(case), case
    assert code == 1, said
    assert "Traceback" not in said
    (told,) = re.findall(r"p3o_v2\.py: (.*)", said)
    assert told.startswith("--reward-fn in/rewards.py:") and re.search(sentence, told), told
    prompt, response = json.loads((folder / "culprit.json").read_text())
    assert (f"{prompt!r} and response {response!r}" in told) >= is_culprit_told
    assert "the same command with --resume goes on" in said
    run_folder = folder / "runs/p3o_v2/ok/tiny"
    assert [path.name for path in (run_folder / "checkpoint").iterdir()] == ["00000001"]
    (folder / "mended").touch()
    said = run(
        script,
        *SMALL[script].split(),
        "--dataset",
        "in/ok.jsonl",
        *flags.split(),
        "--resume",
        cwd=folder,
    )
    assert "checkpoint/00000001" in said
    assert [row["step"] for row in lines(run_folder / "metrics.jsonl")] == [1, 2, 3]
    assert (run_folder / "model").is_dir()


ONE_STEP = "--num-updates 3 --save-every 1 --prompts-per-update 4"
NOT_FINITE = [
    # what the sentence names, which update does not come to an end
    ("p3o_v2", f"--model in/nan {TINY_REWARD}", "logps", 1),
    ("p3o_v2", "--reward-model in/nan_scorer", "score", 1),
    ("p3o_v2", f"{ONE_STEP} --learning-rate 1e15", "logps", 2),
    ("sft", "--model in/nan", "logps", 1),
    (
        "sft",
        "--num-updates 4 --save-every 1 --lr-schedule constant --learning-rate 1e15",
        "loss",
        2,
    ),
    ("reward_model", "--model in/nan", "score", 1),
    (
        "reward_model",
        "--num-updates 4 --save-every 1 --lr-schedule constant --learning-rate 1e15",
        "score",
        2,
    ),
]


@pytest.mark.parametrize("case", NOT_FINITE, ids=named)
def test_numbers_that_are_not_finite(case, outcome):
    (code, said, folder), (script, _, quantity, update) = outcome(case), case
    assert code == 1, said
    assert "Traceback" not in said
    (told,) = re.findall(rf"{script}\.py: (.*)", said)
    where = r"(?:in rows \[.*\] of the|for the whole) batch"
    match = re.fullmatch(rf"update (\d+): (.*) not finite {where}, which is in (.*)\.", told)
    assert match and int(match[1]) == update and quantity in match[2], told
    assert "the same command with --resume goes on" in said
    (file,) = folder.glob(f"runs/{script}/*/*/bad_batch_0.json")
    assert folder / match[3] == file
    batch = json.loads(file.read_text())
    assert batch["update"] == update and all("cactus" in x for x in batch["prompts"])
    assert len(batch["responses"]) % len(batch["prompts"]) == 0 and quantity in batch
    kept = [path.name for path in file.parent.glob("checkpoint/*")]
    assert kept == ([f"{update - 1:08}"] if update > 1 else [])
    assert not (file.parent / "model").exists()


def test_rows_that_are_not_finite_are_those_which_cause_it(inputs, tmp_path):
    """A reward model that breaks on one word."""
    rows = [a_row(i) for i in range(24)] + [
        a_row(0, prompt="\n\nHuman: How can I make jam?\n\nAssistant:")
    ] * 24
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text(jsonl(*rows))
    (tmp_path / "data/test.jsonl").write_text(jsonl(*rows[:8]))
    flags = "--dataset data --prompts-per-update 24 --minibatch-size 24 --num-updates 4 --reward-model".split()
    said = run(
        "p3o_v2", *SMALL["p3o_v2"].split(), *flags, inputs / "nan_for_jam", cwd=tmp_path, code=1
    )
    batch = json.loads((tmp_path / "runs/p3o_v2/data/tiny/bad_batch_0.json").read_text())
    broken = {
        i // 4
        for i, response in enumerate(batch["responses"])
        if " jam" in batch["prompts"][i // 4] + response
    }
    assert broken and batch["rows"] == sorted(broken)
    assert f"in rows {batch['rows']} of the batch" in said


def test_a_run_with_a_model_that_broke_goes_on_when_it_is_whole_again(inputs, tmp_path):
    (tmp_path / "in").symlink_to(inputs)
    shutil.copytree(inputs / "scorer", tmp_path / "scorer")
    flags = (
        SMALL["p3o_v2"].split()
        + "--dataset in/ok.jsonl --reward-model scorer --save-every 1".split()
    )
    run("p3o_v2", *flags, "--num-updates", 1, cwd=tmp_path)
    shutil.copytree(inputs / "nan_scorer", tmp_path / "scorer", dirs_exist_ok=True)
    said = run("p3o_v2", *flags, "--num-updates", 3, "--resume", cwd=tmp_path, code=1)
    assert "update 2: score, loss, gradient not finite in rows" in said
    run_folder = tmp_path / "runs/p3o_v2/ok/tiny"
    assert [path.name for path in (run_folder / "checkpoint").iterdir()] == ["00000001"]
    shutil.copytree(inputs / "scorer", tmp_path / "scorer", dirs_exist_ok=True)
    run("p3o_v2", *flags, "--num-updates", 3, "--resume", cwd=tmp_path)
    assert [row["step"] for row in lines(run_folder / "metrics.jsonl")] == [1, 2, 3]


def test_the_sentence_that_ends_a_run_has_its_own_line(inputs, tmp_path):
    """Not the end of the line of the progress bar."""
    flags = ["--dataset", inputs / "ok.jsonl", "--reward-model", inputs / "nan_scorer"]
    said = run("p3o_v2", *SMALL["p3o_v2"].split(), *flags, cwd=tmp_path, code=1)
    assert re.search(r"^p3o_v2\.py: update 1: ", said, re.MULTILINE), said


@pytest.mark.parametrize("script", EVERY)
def test_debug_shows_the_traceback(script, tmp_path):
    code, said = Script(script, "--dataset", "nothing.jsonl", "--debug", cwd=tmp_path).wait()
    assert (
        code == 1
        and "Traceback" in said
        and "UserError: --dataset nothing.jsonl: no dataset is there" in said
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "record, name",
    [("evil", "evil"), ("dots", None), ("not_ours", None), ("array", None), ("broken", None)],
)
def test_names_of_other_runs_do_not_lead_out_of_the_runs(record, name, inputs, tmp_path):
    """A model's args.json is not ours to trust: the run lies in runs/SCRIPT/DATASET/NAME, or the record is refused."""
    (tmp_path / "in").symlink_to(inputs)
    flags = ["--model", f"in/record_{record}/model", "--dataset", "in/ok.jsonl"]
    code, said = Script("sft", *SMALL["sft"].split(), *flags, cwd=tmp_path).wait()
    assert "Traceback" not in said
    assert code == 0 or code == 2 and name is None and "args.json" in said, said
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "runs"}
    assert [
        len(path.relative_to(tmp_path).parts) for path in tmp_path.glob("**/metrics.jsonl")
    ] == [5] * (code == 0)
    assert name is None or (tmp_path / "runs/sft/ok" / name / "model").is_dir()
