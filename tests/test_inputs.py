"""What the scripts read: tokenizers, texts, reward files, data of many forms, names of models."""

import gzip
import json
import math
import re
import sys
from collections import Counter
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from conftest import TINY, build, save, write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import dpo
import p3o_v2
import reward_model
import sft
from p3o_v2 import (
    UserError,
    decode_texts,
    encode_prompts,
    load_function,
    load_prompts,
    load_tokenizer,
    text_rewards,
)
from sft import encode_responses, load_examples


# ------------------------------------------------------------------------------ tokens and texts
def tokenizer_of(kind, adds=""):
    """A small one that marks a leading space as Pythia does, or as Llama does, whose decoding
    drops the first one. `adds`: what it adds to any text, such as "<bos> $A <eos>"."""
    tokenizer = Tokenizer(models.BPE())
    alphabet = []
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<eos>", "<bos>", "<turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = ["Human: what colour is the sky? Assistant: the sky is blue, I think. a"]
    tokenizer.train_from_iterator(texts, trainer)
    if adds:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=adds, special_tokens=[(token, i) for i, token in enumerate(special)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<eos>"
    )


@pytest.mark.parametrize("adds", ["", "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
def test_prompts_keep_their_bos_and_never_end_with_an_added_eos(adds):
    tokenizer = tokenizer_of("byte_level", adds)
    texts = ["the sky", "is it blue?", "a"]
    for text, ids in zip(texts, encode_prompts(tokenizer, texts)):
        bos = [tokenizer.bos_token_id] if "<bos>" in adds else []
        assert ids.tolist() == bos + tokenizer(text, add_special_tokens=False).input_ids
    assert encode_prompts(tokenizer, []) == []


@pytest.mark.parametrize("adds", ["", "<bos> $A <eos>"])
def test_responses_end_with_exactly_one_end_token(adds):
    """The first end token that was typed ends them there; what is cut is counted."""
    tokenizer = tokenizer_of("byte_level", adds)
    eos, turn = tokenizer.convert_tokens_to_ids(["<eos>", "<turn>"])
    end_ids, counts = sorted([eos, turn]), Counter()
    blue = tokenizer(" blue", add_special_tokens=False).input_ids
    sky = tokenizer(" the sky", add_special_tokens=False).input_ids
    texts = [" blue", " blue<eos>", " blue<turn>", " blue<turn> the sky", " blue<eos> the<eos>"]
    found = encode_responses(tokenizer, [*texts, " the sky" * 9], end_ids, 12, counts)
    found = [ids.tolist() for ids in found]
    assert found[:2] == [[*blue, eos]] * 2 and found[2:4] == [[*blue, turn]] * 2
    assert found[4] == [*blue, eos]
    assert found[5] == (sky * 9)[:12]
    assert +counts == {"texts cut at an end token": 2, "responses cut at 12 tokens": 1}


def test_ends_are_those_of_the_tokenizer_and_of_the_generation_config(tmp_path):
    tokenizer = tokenizer_of("byte_level")
    model = build("llama", "policy", seed=1, vocab_size=len(tokenizer))
    for own, expected in ((None, [0]), (0, [0]), (2, [0, 2]), ([5, 2], [0, 2, 5])):
        model.generation_config.eos_token_id = own
        save(model, tmp_path, tokenizer)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert load_tokenizer(str(tmp_path), loaded)[1] == expected


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_decoded_responses_keep_their_leading_space(kind):
    tokenizer = tokenizer_of(kind, "<bos> $A")
    prompts = encode_prompts(tokenizer, ["what colour is the sky?", "Assistant:"])
    texts = [[" blue, I think", " the sky"], [" I think", " the sky is blue"]]
    responses = [encode_responses(tokenizer, group, [0], 99, Counter()) for group in texts]
    found = decode_texts(tokenizer, prompts, responses)
    assert [row["response"] for row in found] == [*texts[0], *texts[1]]
    expected = ["what colour is the sky?"] * 2 + ["Assistant:"] * 2
    assert [row["prompt"] for row in found] == expected


# ---------------------------------------------------------------------------------- reward files
@pytest.fixture
def imports(monkeypatch):
    """What is imported within a test is forgotten after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_reward_file_may_use_its_neighbours_and_their_processes(tmp_path, imports):
    (tmp_path / "a_neighbour.py").write_text("def one(text):\n    return 3 * len(text)\n")
    (tmp_path / "a_reward.py").write_text(
        "import multiprocessing\n"
        "from a_neighbour import one\n"
        "def score(prompts, responses):\n"
        "    with multiprocessing.get_context('fork').Pool(1) as pool:\n"
        "        return pool.map(one, responses)\n"
    )
    score = load_function(f"{tmp_path}/a_reward.py:score")
    assert score(["x", "x"], ["ab", "c"]) == [6, 3]


def test_two_reward_files_of_one_name_are_two_modules(tmp_path, imports):
    for number in (1, 2):
        (tmp_path / f"folder{number}").mkdir()
        (tmp_path / f"folder{number}/a_reward.py").write_text(
            f"NUMBER = {number}\ndef score(prompts, responses):\n    return [NUMBER]\n"
        )
    one, two = (load_function(f"{tmp_path}/folder{number}/a_reward.py:score") for number in (1, 2))
    assert one([], []) == [1] and two([], []) == [2]


@pytest.mark.parametrize("spec", ["nowhere.py:f", "a_reward.py:g", "a_reward.py", "a_reward"])
def test_a_reward_function_that_is_not_there_is_a_mistake_of_the_user(
    spec, tmp_path, monkeypatch, imports
):
    (tmp_path / "a_reward.py").write_text("def f(prompts, responses):\n    return []\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=spec.split(":")[0]):
        load_function(spec)


def test_rewards_may_be_a_list_an_array_or_a_tensor():
    tokenizer = tokenizer_of("byte_level")
    prompts = encode_prompts(tokenizer, ["the sky", "blue"])
    responses = [[torch.arange(5, 7 + k) for k in range(3)] for _ in prompts]
    numbers = [0.5, 1, -2, 3, 4.25, 5]
    for kind in (list, np.array, torch.tensor, partial(np.array, dtype=np.float32), tuple):
        seen = []

        def function(prompts, responses, kind=kind, seen=seen):
            seen.append((prompts, responses))
            return kind(numbers)

        found = text_rewards(function, tokenizer, prompts, responses)
        assert found.tolist() == [numbers[:3], numbers[3:]] and found.dtype == torch.float32
        assert seen[0][0] == ["the sky"] * 3 + ["blue"] * 3 and len(seen[0][1]) == 6
    for wrong in (numbers[:5], numbers + [1], [1.0, math.nan, 1, 1, 1, 1], [math.inf] * 6, 0.5):
        with pytest.raises(UserError):
            text_rewards(lambda x, y, wrong=wrong: wrong, tokenizer, prompts, responses)


# ------------------------------------------------------------------------------------------ data
ROWS = [{"prompt": f"the sky {i}", "chosen": " blue", "rejected": " a"} for i in range(30)]


LATER = [(sft, ("completion",)), (reward_model, ("chosen", "rejected"))]


def write_file(file, rows):
    """In the form that its name says."""
    if file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        write_rows(file, rows)
        if file.suffix == ".gz":
            file.write_bytes(gzip.compress(file.read_bytes()))
    return str(file)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_a_file_of_any_form_is_read_and_a_tenth_of_it_held_out(name, tmp_path):
    args = p3o_v2.Args(dataset=write_file(tmp_path / name, ROWS))
    tokenizer = tokenizer_of("byte_level")
    held_out, prompts = load_prompts(tokenizer, 99, args)
    assert (len(held_out), len(prompts)) == (3, 27)
    found = sorted(tokenizer.batch_decode(held_out + prompts))
    assert found == sorted(row["prompt"] for row in ROWS)


def test_a_file_in_the_current_folder_is_read(tmp_path, monkeypatch):
    write_rows(tmp_path / "a.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    args = p3o_v2.Args(dataset="a.jsonl")
    assert len(load_prompts(tokenizer_of("byte_level"), 99, args)[1]) == 27


def hh(rows):
    """Rows as HH's dialogues."""
    found = []
    for row in rows:
        start = f"\n\nHuman: {row['prompt']}\n\nAssistant: what?\n\nHuman: is it\n\nAssistant:"
        found.append({key: start + row[key] for key in ("chosen", "rejected")})
    return found


@pytest.mark.parametrize("form", [list, hh])
def test_held_out_prompts_are_not_trained_on_and_prompts_come_once(form, tmp_path, capsys):
    """What is too long is counted; in HH's form the prompt ends at the last answer."""
    rows = [*ROWS[:8], *ROWS[:2], {**ROWS[0], "prompt": "the sky" * 40}]
    write_rows(tmp_path / "train.jsonl", form([*rows, *ROWS[8:20]]))
    write_rows(tmp_path / "test.jsonl", form(ROWS[:4]))
    tokenizer = tokenizer_of("byte_level")
    held_out, prompts = load_prompts(tokenizer, 70, p3o_v2.Args(dataset=str(tmp_path)))
    assert (len(held_out), len(prompts)) == (4, 16)
    texts = tokenizer.batch_decode(held_out + prompts)
    assert len(set(texts)) == 20
    assert form is list or all(text.endswith("is it\n\nAssistant:") for text in texts)
    [counted] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("training")]
    # Kept, rows, repeated, held out, too long, the limit
    assert re.findall(r"\d+", counted) == ["16", "23", "2", "4", "1", "70"]
    for script, columns in LATER:
        args = script.Args(dataset=str(tmp_path))
        held_out, examples, _ = script.load_examples(tokenizer, [0], 70, columns, args)
        assert (len(held_out), len(examples)) == (4, 16)
        assert {tokenizer.decode(x) for x, _ in held_out + examples} == set(texts)
        for _, responses in held_out + examples:
            expected = [" blue<eos>", " a<eos>"][: len(columns)]  # chosen stands for completion
            assert tokenizer.batch_decode(responses) == expected
        assert "'prompts of more than 70 tokens dropped': 1" in capsys.readouterr().out


def test_a_script_trains_on_no_prompt_that_another_holds_out(tmp_path):
    """Of a file whose rows do not all suit every script."""
    rows = [{**row, "rejected": " a" if i % 3 else ""} for i, row in enumerate(ROWS)]
    dataset = write_file(tmp_path / "a.jsonl", rows)
    tokenizer = tokenizer_of("byte_level")
    held_out, prompts = map(
        tokenizer.batch_decode, load_prompts(tokenizer, 99, p3o_v2.Args(dataset=dataset))
    )
    for script, columns in LATER:
        args = script.Args(dataset=dataset)
        *parts, _ = script.load_examples(tokenizer, [0], 99, columns, args)
        for part, texts in zip(parts, (held_out, prompts)):
            assert part and {tokenizer.decode(x) for x, _ in part} <= set(texts)


def test_rows_with_an_empty_text_are_dropped_and_counted(tmp_path, capsys):
    bad = [{**ROWS[0], "prompt": ""}, {**ROWS[1], "chosen": ""}]
    write_rows(tmp_path / "train.jsonl", ROWS[4:] + bad)
    write_rows(tmp_path / "test.jsonl", ROWS[2:4])
    args = sft.Args(dataset=str(tmp_path))
    _, examples, _ = load_examples(tokenizer_of("byte_level"), [0], 99, ("completion",), args)
    assert len(examples) == 26
    assert "no common prompt dropped': 2" in capsys.readouterr().out


def test_dialogues_without_a_common_prompt_are_dropped_and_counted(tmp_path, capsys):
    others = [{"chosen": "\n\nHuman: Hi\n\nAssistant: Yes.", "rejected": "No."}, {"chosen": "Ho."}]
    write_rows(tmp_path / "train.jsonl", hh(ROWS[4:8]) + others)
    write_rows(tmp_path / "test.jsonl", hh(ROWS[:4]))
    args = dpo.Args(dataset=str(tmp_path))
    columns = ("chosen", "rejected")
    _, examples, _ = dpo.load_examples(tokenizer_of("byte_level"), [0], 99, columns, args)
    assert len(examples) == 4
    assert "no common prompt dropped': 2" in capsys.readouterr().out


def test_the_checksum_is_that_of_the_texts_in_their_order(tmp_path):
    """Of both splits, and of the columns that are read."""
    tokenizer, found = tokenizer_of("byte_level"), []
    for number, (train, test) in enumerate(
        [
            (ROWS[4:], ROWS[:4]),
            ([{**row, "more": 1, "completion": ""} for row in ROWS[4:]], ROWS[:4]),
            ([*ROWS[5:], ROWS[4]], ROWS[:4]),
            ([*ROWS[4:-1], {**ROWS[-1], "rejected": " blue"}], ROWS[:4]),
            (ROWS[4:], [*ROWS[:3], {**ROWS[3], "chosen": " a"}]),
        ]
    ):
        write_rows(tmp_path / f"{number}/train.jsonl", train)
        write_rows(tmp_path / f"{number}/test.jsonl", test)
        args = dpo.Args(dataset=f"{tmp_path}/{number}")
        found.append(dpo.load_examples(tokenizer, [0], 99, ("chosen", "rejected"), args)[2])
    assert found[0] == found[1] and len(set(found)) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": [{"role": "user", "content": "Hi"}]},
        {"prompt": None},
        {"prompt": 7},
        {"chosen": [{"role": "assistant", "content": "Hi"}]},
    ],
    ids=["messages", "null", "number", "answers"],
)
def test_what_is_not_text_is_sent_to_prepare_data(change, tmp_path):
    file = write_file(tmp_path / "a.jsonl", [{**row, **change} for row in ROWS])
    for script, columns in LATER:
        with pytest.raises(script.UserError, match=r"a\.jsonl.*prepare_data\.py"):
            args = script.Args(dataset=file)
            script.load_examples(tokenizer_of("byte_level"), [0], 99, columns, args)
    if "prompt" in change:
        with pytest.raises(UserError, match=r"a\.jsonl.*prepare_data\.py"):
            load_prompts(tokenizer_of("byte_level"), 99, p3o_v2.Args(dataset=file))


# ------------------------------------------------------------------------------- names of models
def test_a_stage_is_a_local_run_then_a_public_model_then_the_model_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def found(model, dataset):
        args = p3o_v2.Args(model=model, dataset=dataset)
        return [p3o_v2.find_model(stage, args) for stage in ("sft", "reward_model")]

    for size in ("1b", "2.8b", "6.9b"):
        for model in (f"pythia-{size}", f"pythia-{size}-deduped"):
            policy, reward = found(model, "tldr")
            assert policy == f"trl-lib/pythia-{size}-deduped-tldr-sft"
            assert reward == f"cleanrl/EleutherAI_pythia-{size}-deduped__reward__tldr"
    assert found("pythia-1b", "hh") == ["EleutherAI/pythia-1b", ""]
    assert found("pythia-14m", "tldr") == ["EleutherAI/pythia-14m", ""]
    assert found("you/yours", "data/mine.jsonl") == ["you/yours", ""]
    assert found("tiny", "tldr") == [f"{TINY}/sft", f"{TINY}/reward_model"]
    folders = [f"runs/{stage}/mine.jsonl/yours/model" for stage in ("sft", "reward_model")]
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    assert found("you/yours", "data/mine.jsonl") == folders
    assert found(folders[0], "data/mine.jsonl") == folders  # the run's model, of the same name
    assert found("you/yours", "data/other.jsonl") == ["you/yours", ""]
