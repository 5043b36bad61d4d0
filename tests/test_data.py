"""What scripts read: texts as tokens, reward functions, datasets, models and data of the hub."""

import re
import shutil
import sys
from collections import Counter
from math import inf, nan

import numpy as np
import pytest
import torch
from conftest import SCORED, SHORT, build, save
from datasets import Dataset
from datasets.packaged_modules.json.json import Json
from scripts import TINY, Nursery, lines, run, write_rows, write_splits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import p3o_v2
import sft


# ------------------------------------------------------------------------------ tokens and texts
def tokenizer_of(kind="byte_level", adds=""):
    """A small one that marks a leading space as Pythia does, or as Llama does, whose decoding
    drops the first one. `adds`: what it adds to any text, such as "<bos> $A <eos>"."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
        tokenizer.decoder = decoders.ByteLevel()
    special, letters = ["<eos>", "<bos>", "<turn>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=letters)
    tokenizer.train_from_iterator(["Human: what is the sky? Assistant: blue, I think. a"], trainer)
    if adds:
        ids = [(token, i) for i, token in enumerate(special)]
        tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ids)
    tokens = {"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


TOKENIZER = tokenizer_of()


@pytest.mark.parametrize("adds", ["", "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
def test_prompts_keep_their_bos_and_never_end_with_an_added_eos(adds):
    tokenizer, texts = tokenizer_of(adds=adds), ["the sky", "is it blue?", "a"]
    bos = [tokenizer.bos_token_id] if "<bos>" in adds else []
    plain = tokenizer(texts, add_special_tokens=False).input_ids
    found = p3o_v2.encode_prompts(tokenizer, texts)
    assert [ids.tolist() for ids in found] == [bos + ids for ids in plain]
    assert p3o_v2.encode_prompts(tokenizer, []) == []


@pytest.mark.parametrize("adds", ["", "<bos> $A <eos>"])
def test_responses_end_with_exactly_one_end_token(adds):
    """The first end token that was typed ends them there; what is cut is counted."""
    tokenizer, counts = tokenizer_of(adds=adds), Counter()
    eos, turn = tokenizer.convert_tokens_to_ids(["<eos>", "<turn>"])
    blue, sky = tokenizer([" blue", " the sky"], add_special_tokens=False).input_ids
    texts = [" blue", " blue<eos>", " blue<turn>", " blue<turn> the sky", " blue<eos> the<eos>"]
    found = sft.encode_responses(tokenizer, [*texts, " the sky" * 9], [eos, turn], 12, counts)
    ended = [[*blue, end] for end in (eos, eos, turn, turn, eos)]
    assert [ids.tolist() for ids in found] == [*ended, (sky * 9)[:12]]
    assert +counts == {"texts cut at an end token": 2, "responses cut at 12 tokens": 1}


def test_ends_are_those_of_the_tokenizer_and_of_the_generation_config(tmp_path):
    model = build("llama", "policy", seed=1, vocab_size=len(TOKENIZER))
    for own, expected in ((None, [0]), (0, [0]), (2, [0, 2]), ([5, 2], [0, 2, 5])):
        model.generation_config.eos_token_id = own
        save(model, tmp_path, TOKENIZER)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert p3o_v2.load_tokenizer(str(tmp_path), loaded)[1] == expected


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_decoded_responses_keep_their_leading_space(kind):
    tokenizer = tokenizer_of(kind, "<bos> $A")
    texts = {"what colour is the sky?": [" blue, I think", " the sky"], "Assistant:": [" a", " is"]}
    responses = [sft.encode_responses(tokenizer, y, [0], 99, Counter()) for y in texts.values()]
    found = p3o_v2.decode_texts(tokenizer, p3o_v2.encode_prompts(tokenizer, list(texts)), responses)
    assert found == [{"prompt": x, "response": y} for x, group in texts.items() for y in group]


# ---------------------------------------------------------------------------------- reward files
def test_reward_files_of_one_name_find_their_neighbours_when_called(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", sys.path.copy())
    functions = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"of_{name}.py").write_text(f"NAME = {name!r}")
        code = f"def score(prompts, responses):\n    from of_{name} import NAME\n    return NAME"
        (tmp_path / name / "reward.py").write_text(code)
        functions.append(p3o_v2.load_function(f"{tmp_path}/{name}/reward.py:score"))
    assert [function([], []) for function in functions] == ["one", "two"]


@pytest.mark.parametrize("kind", [list, tuple, np.array, np.float32, torch.tensor])
def test_rewards_may_be_a_list_an_array_or_a_tensor(kind):
    numbers = [0.5, 1, -2, 3, 4.25, 5]
    prompts = p3o_v2.encode_prompts(TOKENIZER, ["the sky", "blue"])
    responses = [[torch.arange(5, 7 + k) for k in range(3)] for _ in prompts]

    def function(prompts, responses):
        assert (prompts, len(responses)) == (["the sky"] * 3 + ["blue"] * 3, 6)
        return kind(numbers)

    found = p3o_v2.text_rewards(function, TOKENIZER, prompts, responses)
    assert found.tolist() == [numbers[:3], numbers[3:]] and found.dtype == torch.float32
    for wrong in (numbers[:5], [*numbers, 1], [1, nan, 1, 1, 1, 1], [inf] * 6, 0.5):
        with pytest.raises(p3o_v2.UserError):
            p3o_v2.text_rewards(lambda x, y, wrong=wrong: wrong, TOKENIZER, prompts, responses)


# ------------------------------------------------------------------------------------------ data
ANSWERS = {"completion": " I", "chosen": " blue", "rejected": " a"}
ROWS = [{"prompt": f"the sky {i}", **ANSWERS} for i in range(30)]
COLUMNS = [("completion",), ("chosen", "rejected")]


def prompts_of(dataset, longest=99):
    """Texts of the held-out and of the training prompts."""
    parts = p3o_v2.load_prompts(TOKENIZER, longest, p3o_v2.Args(dataset=str(dataset)))
    return [TOKENIZER.batch_decode(prompts) for prompts in parts]


def examples_of(dataset, columns, longest=99):
    """(prompt, responses), texts, to evaluate and to learn from; and the checksum."""
    args = sft.Args(dataset=str(dataset))
    *parts, crc = sft.load_examples(TOKENIZER, [0], longest, ("prompt", *columns), args)
    decode = TOKENIZER.batch_decode
    return *[[(TOKENIZER.decode(x), decode(y)) for x, y in part] for part in parts], crc


@pytest.mark.parametrize("file", ["a.jsonl.gz", "a.json", "a.parquet"])
def test_a_tenth_of_a_file_of_any_form_is_held_out_of_every_script(file, tmp_path, monkeypatch):
    """The same, though not all rows suit every script. The file is in the current folder."""
    monkeypatch.chdir(tmp_path)
    rows = [{**row, "rejected": " a" if i % 3 else ""} for i, row in enumerate(ROWS)]
    if file == "a.parquet":
        Dataset.from_list(rows).to_parquet(file)
    else:
        Dataset.from_list(rows).to_json(file, lines=file == "a.jsonl.gz")
    prompts = prompts_of(file)
    assert [len(part) for part in prompts] == [3, 27]
    assert sorted(prompts[0] + prompts[1]) == sorted(row["prompt"] for row in ROWS)
    for columns in COLUMNS:
        for examples, part in zip(examples_of(file, columns), prompts):
            assert examples and {prompt for prompt, _ in examples} <= set(part)


def hh(rows):
    """Rows as HH's dialogues."""
    middle = "\n\nAssistant: what?\n\nHuman: is it\n\nAssistant:"
    starts = [f"\n\nHuman: {row['prompt']}{middle}" for row in rows]
    return [{key: x + row[key] for key in COLUMNS[1]} for x, row in zip(starts, rows)]


@pytest.mark.parametrize("form", [list, hh])
def test_held_out_prompts_are_not_trained_on_and_prompts_come_once(form, tmp_path, capsys):
    """What is too long is counted; in HH's form the prompt ends at the last answer."""
    rows = [*ROWS[:8], *ROWS[:2], {**ROWS[0], "prompt": "the sky" * 40}, *ROWS[8:20]]
    write_splits(tmp_path, form(rows), form(ROWS[:4]))
    held_out, prompts = prompts_of(tmp_path, 70)
    assert (len(held_out), len(prompts), len({*held_out, *prompts})) == (4, 16, 20)
    assert form is list or all(text.endswith("is it\n\nAssistant:") for text in held_out)
    [counted] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("training")]
    # Kept, rows, repeated, held out, too long, the limit
    assert re.findall(r"\d+", counted) == ["16", "23", "2", "4", "1", "70"]
    for columns in COLUMNS:
        names = ["chosen"] if form is hh and columns == ("completion",) else columns
        responses = [f"{ANSWERS[name]}<eos>" for name in names]
        expected = [[(prompt, responses) for prompt in part] for part in (held_out, prompts)]
        assert [*examples_of(tmp_path, columns, 70)[:2]] == expected
        assert re.search("70 tokens[^,]*: 1", capsys.readouterr().out)


OTHERS = [{"chosen": "\n\nHuman: Hi\n\nAssistant: Yes.", "rejected": "N" * 99}, {"chosen": "Ho."}]
EMPTY = [{**ROWS[0], "prompt": ""}, {**ROWS[1], "chosen": ""}]


@pytest.mark.parametrize("form, bad", [(list, EMPTY), (hh, OTHERS)])
def test_rows_without_a_text_or_a_common_prompt_are_counted(form, bad, tmp_path, capsys):
    write_splits(tmp_path, form(ROWS[4:]) + bad, form(ROWS[2:4]))
    assert len(examples_of(tmp_path, ("chosen", "rejected"))[1]) == 26
    assert re.search("no common prompt[^,]*: 2", capsys.readouterr().out)


def test_the_checksum_is_that_of_the_texts_in_their_order(tmp_path):
    """Of both splits, and of the columns that are read."""
    train, test = ROWS[4:], ROWS[:4]
    versions = [
        (train, test),
        ([{**row, "more": 1, "completion": ""} for row in train], test),
        ([*train[1:], train[0]], test),
        ([{**train[0], "rejected": " blue"}, *train[1:]], test),
        (train, [{**test[0], "chosen": " a"}, *test[1:]]),
    ]
    found = []
    for splits in versions:
        write_splits(tmp_path / str(len(found)), *splits)
        found.append(examples_of(tmp_path / str(len(found)), ("chosen", "rejected"))[-1])
    assert found[0] == found[1] and len(set(found)) == 4


@pytest.mark.parametrize("key", ["prompt", "chosen"])
@pytest.mark.parametrize("value", [[{"role": "user", "content": "Hi"}], None, 7])
def test_what_is_not_text_is_sent_to_prepare_data(key, value, tmp_path):
    write_rows(tmp_path / "a.jsonl", [{**row, key: value} for row in ROWS])
    with pytest.raises(sft.UserError, match=r"a\.jsonl.*prepare_data\.py"):
        examples_of(tmp_path / "a.jsonl", ("chosen", "rejected"))
    if key == "prompt":
        with pytest.raises(p3o_v2.UserError, match=r"a\.jsonl.*prepare_data\.py"):
            prompts_of(tmp_path / "a.jsonl")


# --------------------------------------------------------------------- models and data of the hub
PUBLIC = "trl-lib/pythia-1b-deduped-tldr-sft", "cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr"
LOCAL = "runs/sft/mine.jsonl/yours/model", "runs/reward_model/mine.jsonl/yours/model"


def test_a_stage_is_a_local_run_then_a_public_model_then_the_model_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def found(model, dataset):
        args = p3o_v2.Args(model=model, dataset=dataset)
        return tuple(p3o_v2.find_model(stage, args) for stage in ("sft", "reward_model"))

    for size in ("1b", "2.8b", "6.9b"):
        for model in (f"pythia-{size}", f"pythia-{size}-deduped"):
            assert found(model, "tldr") == tuple(name.replace("1b", size) for name in PUBLIC)
    assert found("pythia-1b", "hh") == ("EleutherAI/pythia-1b", "")
    assert found("pythia-14m", "tldr") == ("EleutherAI/pythia-14m", "")
    assert found("tiny", "tldr") == (f"{TINY}/sft", f"{TINY}/reward_model")
    for folder in LOCAL:
        (tmp_path / folder).mkdir(parents=True)
    assert found("you/yours", "data/mine.jsonl") == LOCAL
    assert found(LOCAL[0], "data/mine.jsonl") == LOCAL  # the run's model, of the same name


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Where processes start that find public models in the hub's cache, of 16 bits and with more
    embeddings than tokens, the reward model in the old format and with a [PAD]; and public data."""
    home = tmp_path_factory.mktemp("home")
    for kind, name in (("policy", PUBLIC[0]), ("score", PUBLIC[1])):
        repository = home / f"hub/models--{name.replace('/', '--')}"
        folder = repository / "snapshots/0123"
        model = build("gpt_neox", kind, 1, vocab_size=784, max_position_embeddings=512).half()
        tokenizer = AutoTokenizer.from_pretrained(TINY / "sft")
        if kind == "score":
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        save(model, folder, tokenizer)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("0123")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    starts = ["SUBREDDIT: tea"] * 36 + ["TITLE: tea"] * 6
    rows = [{**ROWS[0], "prompt": f"{start}\n\nPOST: {i}"} for i, start in enumerate(starts)]
    write_splits(home, rows[:30], rows[30:])
    files = {"train": [f"{home}/train.jsonl"], "validation": [f"{home}/test.jsonl"]}
    name = "tldr-preference"
    builder = Json(cache_dir=str(home), dataset_name=name, hash="0123", data_files=files)
    builder.download_and_prepare()
    shutil.copytree(builder.cache_dir, home / f"datasets/trl-lib___{name}/default/0.0.0/0123")
    return Nursery(HF_HUB_CACHE=f"{home}/hub", HF_DATASETS_CACHE=f"{home}/datasets")


@pytest.mark.parametrize("script", SCORED)
def test_the_users_own_command_runs_to_the_end_with_nothing_prepared(script, hub, tmp_path):
    sizes = [*SHORT[script], *"--num-updates 3 --eval-every 2 --max-response-tokens 16".split()]
    said = run(script, "--model", "pythia-1b", *sizes, cwd=tmp_path, nursery=hub)
    assert all(name in said for name in PUBLIC)
    assert re.search("held-out +6 ", said)  # of 12, as 6 are news articles
    folder = tmp_path / f"runs/{script}/tldr/pythia-1b"
    points = lines(folder / "frontier.jsonl")
    assert points[0]["kl"] == 0 != points[-1]["kl"] and points[0]["reward_se"] > 0
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.vocab_size == 784 and model.dtype == torch.float32
