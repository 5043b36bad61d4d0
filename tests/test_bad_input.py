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

import dpo
import p3o_v1

ROOT = Path(__file__).parent.parent
AHEAD = 4  # scripts that run at the same time
TINY_REWARD = f"--reward-model {ROOT}/tiny/reward_model"
SMALL = {
    "p3o_v1": "--num-updates 2 --prompts-per-update 8 --minibatch-size 4 --num-epochs 1 --max-response-tokens 16 "
    "--eval-every 0 --eval-prompts 4",
    "dpo": "--num-updates 2 --minibatch-size 4 --max-response-tokens 16 --eval-every 0 --eval-prompts 4",
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
nan = bad(of_culprit=lambda: float("nan"))
raises = bad(of_culprit=lambda: 1 / 0)
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
        "misnamed": [{"question": "What?", "answer": "That."}],
        "missing": [*rows[:2], {"answer": "That."}],
        "null": [*rows[:2], a_row(2, prompt=None)],
        "number_response": [*rows[:2], a_row(2, completion=7, rejected=7)],
        "one_row": rows[:1],
        "no_prompts": [a_row(i, prompt="") for i in range(8)],
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
    (folder / "latin.jsonl").write_bytes(jsonl(rows[0]).replace("Say", "Né").encode("latin-1"))
    (folder / "not_zipped.jsonl.gz").write_text(start)
    (folder / "no.parquet").write_text(start)
    (folder / "blank_lines.jsonl").write_text("\n" + jsonl(*rows).replace("\n", "\n\n") + "  \n")
    (folder / "empty_folder").mkdir()
    (folder / "full").mkdir()
    (folder / "full/notes.txt").write_text("mine")
    (folder / "file").write_text("mine")
    (folder / "raises.py").write_text("1 / 0\n")
    (folder / "exits.py").write_text("raise SystemExit\n")
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
    shutil.copytree(folder / "scorer", folder / "cut_short")
    weights = (folder / "cut_short/model.safetensors").read_bytes()
    (folder / "cut_short/model.safetensors").write_bytes(weights[: len(weights) // 2])


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


EMPTY = "dropped: empty prompt or response, or no prompt in common"
ROW = "row 3 of train: ValueError: expected text or messages in"
REFUSED = [
    # what is not there, or cannot be read
    ("p3o_v1", "--model no/such-model", "--model no/such-model: no model is there"),
    ("dpo", "--model in/empty_folder", "--model in/empty_folder: no model can be read from there"),
    ("dpo", "--model in/cut_short", "--model in/cut_short: no model can be read from there"),
    ("p3o_v1", "--dataset no/such-data", "--dataset no/such-data: no dataset is there"),
    ("p3o_v1", "--dataset in/not_zipped.jsonl.gz", "Not a gzipped file"),
    ("dpo", "--dataset in/no.parquet", "in/no.parquet: no dataset can be read from there"),
    ("p3o_v1", "--dataset in/latin.jsonl", "no dataset can be read from there (UnicodeDecodeError"),
    # datasets
    ("p3o_v1", "--dataset in/empty.jsonl", "--dataset in/empty.jsonl: the file is empty"),
    ("dpo", "--dataset in/broken.jsonl", "in/broken.jsonl: row 3 of train: JSONDecodeError: "),
    ("p3o_v1", "--dataset in/array.jsonl", "row 3 of train: TypeError: 'list' object is not a"),
    ("dpo", "--dataset in/misnamed.jsonl", "in chosen; found None (columns: question, answer)"),
    ("p3o_v1", "--dataset in/missing.jsonl", f"{ROW} chosen; found None (columns: answer)"),
    ("p3o_v1", "--dataset in/null.jsonl", f"{ROW} prompt; found None"),
    ("dpo", "--dataset in/number_response.jsonl", f"{ROW} rejected; found 7"),
    ("p3o_v1", "--dataset in/misnamed.jsonl --map prompt=answers", "--map prompt=answers: the col"),
    # nothing left
    ("p3o_v1", "--dataset in/no_prompts.jsonl", "in/no_prompts.jsonl: no train prompts are left"),
    ("p3o_v1", "--dataset in/one_row.jsonl", "no train prompts are left"),
    ("dpo", "--dataset in/no_common_prompt.jsonl", f"8 {EMPTY}"),
    ("dpo", "--dataset in/equal.jsonl", "6 dropped: chosen and rejected are equal"),
    # models that do not fit
    ("dpo", "--model in/larger_tokenizer", "its tokenizer has 770 tokens, its embeddings 768"),
    ("dpo", "--model in/no_end", "its tokenizer has no end-of-sequence token"),
    ("p3o_v1", f"--model in/no_tokenizer {TINY_REWARD}", "--model in/no_tokenizer: "),
    ("p3o_v1", f"--reward-model {ROOT}/tiny/sft", "it is no ModelForSequenceClassification, it la"),
    ("p3o_v1", "--reward-model in/two_outputs", "the policy's 768 tokens, found 2 and 768"),
    ("p3o_v1", "--reward-model in/small_vocabulary", "the policy's 768 tokens, found 1 and 99"),
    ("p3o_v1", "--model in/scorer", "no reward: run reward_model.py on in/ok.jsonl"),
    # reward functions
    ("p3o_v1", "--reward-fn nothing.py:f", "--reward-fn nothing.py:f: expected FILE.py:FUNCTION"),
    ("p3o_v1", "--reward-fn in/rewards.py:value", "in/rewards.py:value: expected FILE.py:FUNCTION"),
    ("p3o_v1", "--reward-fn in/raises.py:f", "--reward-fn in/raises.py:f: the file does not run"),
    ("p3o_v1", "--reward-fn in/exits.py:f", "--reward-fn in/exits.py:f: the file does not run"),
    # flags, which are tyro's to refuse
    ("p3o_v1", "--no-such-flag", "Unrecognized options: --no-such-flag"),
    ("dpo", "--beta big", "--beta"),
    # run folders
    (
        "p3o_v1",
        "--output-dir in/file/run",
        "--output-dir in/file/run: nothing can be written there",
    ),
    ("p3o_v1", "--output-dir in/full", "in/full holds files already, and no run"),
    ("dpo", "--output-dir in/full --overwrite", "in/full holds files already, and no run"),
]


@pytest.mark.parametrize("case", REFUSED, ids=named)
def test_refused_before_anything_starts(case, outcome, inputs):
    before = snapshot(inputs)
    code, said, folder = outcome(case)
    assert code == 2, said
    assert "Traceback" not in said
    told = " ".join(said.replace("│", " ").split())
    assert case[2] in told, said
    assert "--resume goes on" not in said
    assert [path.name for path in folder.iterdir()] == ["in"]
    assert snapshot(inputs) == before


NUMBERS = [
    (
        p3o_v1,
        {"prompts_per_update": 10, "minibatch_size": 4},
        "--prompts-per-update 10: expected a multiple of",
    ),
    (p3o_v1, {"num_epochs": 0}, "--num-epochs 0: expected at least 1"),
    (p3o_v1, {"learning_rate": -1.0}, "--learning-rate -1.0: expected at least 0"),
    (p3o_v1, {"learning_rate": math.inf}, "--learning-rate inf: expected"),
    (p3o_v1, {"temperature": 0.0}, "--temperature 0.0: expected at least 0.001"),
    (p3o_v1, {"clip_range": math.nan}, "--clip-range nan: expected"),
    (p3o_v1, {"adam_betas": (0.9, 1.0)}, "--adam-betas (0.9, 1.0): expected at least 0, below 1"),
    (p3o_v1, {"ratio_bound": 0.5}, "--ratio-bound 0.5: expected at least 1"),
    (p3o_v1, {"eval_prompts": 1}, "--eval-prompts 1: expected at least 2"),
    (p3o_v1, {"seed": 10**20}, f"--seed {10**20}: expected"),
    (dpo, {"data_epochs": -1}, "--data-epochs -1: expected at least 0"),
    (dpo, {"label_smoothing": 1.0}, "--label-smoothing 1.0: expected at least 0, below 1"),
]
if not torch.cuda.is_available():
    NUMBERS += [(dpo, {"device": "cuda"}, "--device cuda: torch finds no GPU")]


@pytest.mark.parametrize("script, settings, sentence", NUMBERS)
def test_numbers_out_of_range(script, settings, sentence):
    with pytest.raises(script.UserError, match=re.escape(sentence)):
        script.set_up(script.Args(**settings))


# A held-out split of 8 rows; in training 16 good rows, and some to count.
COUNTED = "--dataset in/counted --max-prompt-tokens 40 --max-response-tokens 32"
DIALOGUES = "--dataset in/dialogues --max-response-tokens 16"
HANDLED = [
    ("dpo", COUNTED, "17 train rows", "4 dropped: empty prompt or response", "8 held-out rows")
    + ("1 dropped: chosen and rejected are equal", "1 cut: response of more than 32 tokens"),
    (
        "dpo",
        f"{COUNTED} --truncate-prompts",
        "18 train rows",
        "1 cut: prompt of more than 40 tokens",
    ),
    ("p3o_v1", COUNTED, "1 train rows dropped: their prompts are held out")
    + ("19 different train prompts; 1 too long, dropped; 3 empty, dropped",),
    ("p3o_v1", DIALOGUES, "16 different train prompts; 0 too long, dropped; 3 empty, dropped"),
    ("p3o_v1", "--dataset in/blank_lines.jsonl", "22 different train prompts"),
    (
        "p3o_v1",
        "--dataset in/one_held_out",
        "1 different held-out prompts",
    ),  # without standard errors
    ("p3o_v1", f"--model in/no_pad {TINY_REWARD}", "in/no_pad (no SFT run for it)"),
    ("p3o_v1", "--model in/padded --reward-fn in/rewards.py:fine", "policy        in/padded"),
]


@pytest.mark.parametrize("case", HANDLED, ids=named)
def test_handled_and_counted(case, outcome):
    (code, said, folder), (script, _, *sentences) = outcome(case), case
    assert code == 0, said
    assert "Traceback" not in said and "Warning" not in said
    assert [sentence for sentence in sentences if sentence not in said] == [], said
    (model,) = folder.glob(f"runs/{script}/*/*/model")
    for file in model.parent.glob("[mf]*[sr].jsonl"):
        assert all(math.isfinite(value) for row in lines(file) for value in row.values()), file


def test_text_that_looks_like_a_date_stays_as_it_is(inputs, tmp_path):
    days = {f"2020-01-{day:02}" for day in range(1, 25)}
    (tmp_path / "folder").mkdir()
    shutil.copy(inputs / "dates.jsonl", tmp_path / "folder/train.jsonl")
    for dataset in (inputs / "dates.jsonl", tmp_path / "folder"):
        parts = p3o_v1.read_dataset(None, p3o_v1.Args(dataset=str(dataset)), ())
        assert {prompt for rows in parts for (prompt,) in rows} == days
    run("p3o_v1", *SMALL["p3o_v1"].split(), "--dataset", inputs / "dates.jsonl", cwd=tmp_path)
    first, *_ = lines(tmp_path / "runs/p3o_v1/dates/tiny/samples.jsonl")
    assert first["prompts"] and {*first["prompts"]} <= days


LONGER = "--num-updates 3 --save-every 1"
NUMBERS = r"expected \d+ finite numbers?, found "
STOPPED = [
    # flags of a run, what the sentence says, whether it holds the culprit's prompt and response
    ("p3o_v1", f"{LONGER} --reward-fn in/rewards.py:fewer", f"{NUMBERS}31: ", False),
    ("p3o_v1", f"{LONGER} --reward-fn in/rewards.py:nan", f"{NUMBERS}.*nan", True),
    ("p3o_v1", f"{LONGER} --reward-fn in/rewards.py:raises", "ZeroDivisionError", True),
]


@pytest.mark.parametrize("case", STOPPED, ids=named)
def test_reward_function_that_goes_wrong(case, outcome):
    (code, said, folder), (script, flags, sentence, is_culprit_told) = outcome(case), case
    assert code == 1, said
    assert "Traceback" not in said
    (told,) = re.findall(r"p3o_v1\.py: (.*)", said)
    assert told.startswith("--reward-fn in/rewards.py:") and re.search(sentence, told), told
    prompt, response = json.loads((folder / "culprit.json").read_text())
    assert (f"{prompt!r} and response {response!r}" in told) >= is_culprit_told
    assert "the same command with --resume goes on" in said
    run_folder = folder / "runs/p3o_v1/ok/tiny"
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


LARGE_STEPS = "--num-updates 4 --save-every 1 --learning-rate 1e15"
NOT_FINITE = [
    # what the sentence names, which update does not come to an end
    ("p3o_v1", "--reward-model in/nan_scorer", "score", 1),
    ("p3o_v1", f"{LARGE_STEPS} --prompts-per-update 4", "logps", 2),
    ("dpo", f"{LARGE_STEPS} --lr-schedule constant", "logps", 2),
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


def test_debug_shows_the_traceback(tmp_path):
    flags = ["--dataset", "nothing.jsonl", "--debug"]
    code, said = Script("p3o_v1", *flags, cwd=tmp_path).wait()
    assert code == 1 and "Traceback" in said
    assert "UserError: --dataset nothing.jsonl: no dataset is there" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "record, name",
    [
        ('{"base_name": "../../evil"}', "evil"),
        ('{"model": "../../evil"}', "evil"),  # of p3o_v2.py, sft.py and reward_model.py
        ('{"model": "runs/sft/rows/small/model"}', "small"),
        ('{"base_name": 7}', "model"),
        ('{"model": null}', "model"),
        ("[1]", "model"),
        ("{", "model"),
    ],
)
def test_names_of_other_runs_do_not_lead_out_of_the_runs(record, name, tmp_path):
    """A model's args.json is not ours to trust: the run of it lies in runs/SCRIPT/DATASET/NAME."""
    (tmp_path / "args.json").write_text(record)
    assert p3o_v1.short_name(f"{tmp_path}/model") == name
