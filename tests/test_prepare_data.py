"""prepare_data.py: datasets of any public form become the texts that the scripts join, no more."""

import gzip
import hashlib
import json

import pytest
import tyro
from datasets import Dataset, DatasetDict
from scripts import TINY, lines, refused, run, write_rows
from tokenizers import processors
from transformers import AutoTokenizer

from prepare_data import Args, UserError, main

EOS = "<|endoftext|>"
CHAT = "{{ bos_token }}{% for t in tools or [] %}<tool>{{ t | tojson }}{% endfor %}"
CHAT += "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
CHAT += "{% for key in m['about'] or [] %}({{ key }}){% endfor %}"
CHAT += "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"
PAIRS = [{"prompt": f"Say {i}.", "chosen": " Yes.", "rejected": " No."} for i in range(24)]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A folder with a tokenizer that adds a BOS itself, and a template that writes one, too."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "sft")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, bos)
    tokenizer.chat_template = CHAT
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(folder)
    return str(folder)


class Result:
    """What main(Args(...)) wrote for this file, folder or list of rows."""

    def __init__(self, tmp_path, data, **options):
        if isinstance(data, list):
            write_rows(tmp_path / "rows.jsonl", data)
            data = tmp_path / "rows.jsonl"
        out = tmp_path / "out"
        main(Args(dataset=str(data), output_dir=str(out), overwrite=True, **options))
        self.train, self.test = lines(out / "train.jsonl"), lines(out / "test.jsonl")
        self.rows = sorted(self.train + self.test, key=lambda row: row["prompt"])
        self.info = json.loads((out / "info.json").read_text())
        self.dropped = list(self.info["counts"]["train"]["dropped"].values())


def test_files_of_all_kinds_give_the_same_texts_and_nothing_else(tmp_path):
    """Also texts that look like dates, numbers or nulls; in UTF-8, one line a row."""
    words = ["12", "NA", "null", "nan", "1e5", "Größe\u2028 ?", 'a "b", c']
    rows = [{"prompt": f"Say {x}.", "chosen": x, "rejected": "2024-01-01T00:00:00"} for x in words]
    data = Dataset.from_list(rows)
    data.to_parquet(tmp_path / "rows.parquet")
    data.to_csv(tmp_path / "rows.csv")
    data.to_json(tmp_path / "rows.json", lines=False)
    data.save_to_disk(tmp_path / "saved")
    write_rows(tmp_path / "folder/train.jsonl", rows)
    more = [json.dumps({"score": 1, **row}, ensure_ascii=False) for row in rows]
    text = "\r\n".join(more).encode()
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + text)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text))
    expected = Result(tmp_path, rows)
    assert expected.rows == sorted(rows, key=lambda row: row["prompt"])
    for name in "rows.parquet rows.csv rows.json saved folder marked.jsonl rows.jsonl.gz".split():
        found = Result(tmp_path, tmp_path / name)
        assert (found.train, found.test) == (expected.train, expected.test), name


SPLITS = [  # names, the flag, those that are used
    ("train test validation", "", "train test"),
    ("train_prefs train_sft test_prefs", "train_prefs,test_prefs", "train_prefs test_prefs"),
    ("train test", "test", "test"),
]


@pytest.mark.parametrize("names, split, expected", SPLITS)
def test_splits_go_by_their_names_or_by_the_flag(names, split, expected, tmp_path):
    splits = {x: Dataset.from_list([{"prompt": f"{x} {i}"} for i in "12"]) for x in names.split()}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    found = Result(tmp_path, tmp_path / "saved", split=split)
    train, *test = expected.split()
    parts = [{row["prompt"].split()[0] for row in part} for part in (found.train, found.test)]
    assert parts == [{train}, {*test} or {train}] and len(found.rows) == 2 * len([train, *test])


def test_prompts_of_the_test_split_never_stay_in_the_train_split(tmp_path):
    write_rows(tmp_path / "data/train.jsonl", PAIRS + PAIRS[:3])
    write_rows(tmp_path / "data/validation.jsonl", PAIRS[:4])
    found = Result(tmp_path, tmp_path / "data")
    assert (found.train, found.test) == (PAIRS[4:], PAIRS[:4])


def test_a_prompt_is_held_out_by_its_hash_in_every_dataset_and_order(tmp_path):
    rows = [{**row, "prompt": f"Say {i}."} for i in range(200) for row in PAIRS[:2]]
    for some, share in ((rows, 0.1), (rows, 0.4), (rows[:199:-1], 0.1)):
        found = Result(tmp_path, some, held_out=share)
        assert len(found.rows) == len(some)
        for part, is_test in ((found.train, False), (found.test, True)):
            for row in part:
                number = int(hashlib.sha256(row["prompt"].encode()).hexdigest(), 16)
                assert (number / 2**256 < share) == is_test
    few = [Result(tmp_path, PAIRS[:3], held_out=share).test for share in (0.001, 0.999)]
    assert [len(test) for test in few] == [1, 2]  # at least one goes to each split


def test_the_dialogues_of_hh_are_split_at_their_last_answer(tmp_path):
    starts = [f"\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Say {i}.\n\nAssistant:" for i in "0123"]
    good = [{"chosen": f"{start} Yes.", "rejected": f"{start} No."} for start in starts]
    bad = [{**good[0], "rejected": good[1]["rejected"]}, {**good[0], "chosen": starts[0]}]
    found = Result(tmp_path, good + bad)
    assert found.rows == [{**PAIRS[0], "prompt": start} for start in starts]
    assert found.dropped == [1, 1]


def test_tldr_keeps_the_posts_of_reddit_alone(tmp_path):
    rows = [{"prompt": start} for start in ("SUBREDDIT: 1", "SUBREDDIT: 2", "TITLE: 1")]
    write_rows(tmp_path / "tldr-preference.jsonl", rows)
    assert Result(tmp_path, tmp_path / "tldr-preference.jsonl", strict=True).rows == rows[:2]
    assert Result(tmp_path, rows).rows == rows


def test_texts_stay_as_they_are_less_what_the_tokenizer_adds(chat, tmp_path):
    rows = [{**row, "prompt": f"<s>{row['prompt']}", "chosen": f" Yes.{EOS}"} for row in PAIRS[:3]]
    rows[2]["chosen"] += f" Or{EOS}"
    assert Result(tmp_path, rows, tokenizer=chat).rows == PAIRS[:3]


def test_columns_of_other_names_go_before_those_of_the_dataset(tmp_path):
    own = {"best": " Yes.", "chosen": " No.", "label": " Yes."}
    rows = [{"question": row["prompt"], **own} for row in PAIRS[:3]]
    found = Result(tmp_path, rows, map=("prompt=question", "chosen=best", "rejected=chosen"))
    assert found.rows == PAIRS[:3]
    rows = [{**pair, **row} for pair, row in zip(PAIRS, rows)]
    found = Result(tmp_path, rows, map=("completion=label",))
    assert found.rows == [{"prompt": row["prompt"], "completion": " Yes."} for row in PAIRS[:3]]


def say(role, text):
    return {"role": role, "content": text}


YES, NO, TEXTS = say("assistant", "Yes."), say("assistant", "No."), ["Yes.", "No."]
FORMS = {  # prompt, chosen and rejected for the prompt x
    "no prompt": lambda x: [None, [say("user", x), YES], [say("user", x), NO]],
    "whole dialogues": lambda x: [[say("user", x)], [say("user", x), YES], [say("user", x), NO]],
    "UltraFeedback": lambda x: [x, [say("user", x), YES], [say("user", x), NO]],
    "one message": lambda x: [x, YES, NO],
    "ShareGPT": lambda x: [[{"from": "human", "value": x}], *TEXTS],
    "parts": lambda x: [[say("user", [{"text": x[:2]}, {"text": x[2:]}])], *TEXTS],
}


@pytest.mark.parametrize("form", FORMS)
def test_preferences_of_messages_are_rendered_with_the_prompt_once(form, chat, tmp_path):
    rows = [dict(zip(PAIRS[0], FORMS[form](row["prompt"]))) for row in PAIRS[:4]]
    expected = [[f"<user>Say {i}.<assistant>", *TEXTS] for i in range(4)]
    found = Result(tmp_path, rows, tokenizer=chat)
    assert [list(row.values()) for row in found.rows] == expected
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert Result(tmp_path, tmp_path / "rows.parquet", tokenizer=chat).rows == found.rows


def test_the_last_message_is_the_completion(chat, tmp_path):
    """The template sees other keys of messages, but none that Parquet has filled with nulls."""
    first = [say("user", "Hi") | {"about": {f"n{i}": "Ann"}} for i in range(3)]
    turns = [[x, say("assistant", "?"), say("user", f"Say {i}.")] for i, x in enumerate(first)]
    for rows in (
        [{"messages": [*said, YES], "prompt": "Hi"} for said in turns],
        [{"conversations": [*said, {"from": "gpt", "value": "Yes."}]} for said in turns],
        [{"prompt": said, "completion": [YES]} for said in turns],
    ):
        Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        found = Result(tmp_path, tmp_path / "rows.parquet", tokenizer=chat)
        starts = [f"<user>Hi(n{i})<assistant>?{EOS}\n<user>Say {i}.<assistant>" for i in range(3)]
        assert found.rows == [{"prompt": start, "completion": "Yes."} for start in starts]


def test_system_and_tools_beside_a_prompt_reach_the_template(chat, tmp_path):
    """In every row, also those without a system message; tools may be JSON."""
    rows = [{"prompt": f"Say {i}.", "completion": "Yes."} for i in range(3)]
    rows[0].update(system="Be kind.", tools=[{"name": "clock", "unit": None}])
    rows[1].update(tools='[{"name": "map"}]')
    starts = ['<tool>{"name": "clock"}<system>Be kind.', '<tool>{"name": "map"}', ""]
    expected = {f"{start}<user>Say {i}.<assistant>" for i, start in enumerate(starts)}
    assert {row["prompt"] for row in Result(tmp_path, rows, tokenizer=chat).rows} == expected


@pytest.mark.parametrize("kept", ["", "<think>\n"])
def test_a_prompt_ends_where_an_answer_begins_with_templates_that_think(kept, chat, tmp_path):
    """Whether the template keeps the block that it opens before an answer, or not."""
    template = CHAT.replace("<assistant>{% endif %}", "<assistant><think>\n{% endif %}")
    answer = "{% if m['role'] == 'assistant' %}" + kept + "{% endif %}{{ m['content'] }}"
    template = template.replace("{{ m['content'] }}", answer).replace("eos_token", "''")
    (tmp_path / "t.jinja").write_text(template)
    rows = [{"prompt": [say("user", f"Say {i}.")], "completion": "Yes."} for i in range(3)]
    found = Result(tmp_path, rows, tokenizer=chat, chat_template=str(tmp_path / "t.jinja"))
    starts = [f"<user>Say {i}.<assistant>{kept}" for i in range(3)]
    assert found.rows == [{"prompt": start, "completion": "Yes."} for start in starts]


BAD = {
    "prompt": [None, " \n"],
    "chosen": [None, " No.", "\ud83d"],  # as rejected; half of a surrogate pair
    "rejected": ["", ["No."]],
}
IMAGE, OTHER = say("assistant", [{"type": "image", "url": "x.png"}]), say("user", "A")
BAD_MESSAGES = {
    "prompt": [None, [{"from": "narrator", "value": "Hi"}]],
    "chosen": [say("assistant", ""), IMAGE, [OTHER, YES], [OTHER, say("user", "Say 0."), YES]],
    "rejected": [OTHER],
}


@pytest.mark.parametrize("bad", [BAD, BAD_MESSAGES])
def test_rows_that_cannot_be_used_are_counted_by_reason_and_shown(bad, chat, tmp_path, capsys):
    rows = PAIRS[:3] + [{**PAIRS[0], column: value} for column in bad for value in bad[column]]
    found = Result(tmp_path, rows, tokenizer=chat)
    assert len(found.rows) == 3 and found.dropped == [1] * 7
    said = capsys.readouterr().out
    assert all(f"row {number} of train" in said for number in range(4, 11))
    with pytest.raises(UserError, match="row 4 of train"):
        Result(tmp_path, rows, tokenizer=chat, strict=True)


OWN = f"--tokenizer {TINY}/sft"
MISTAKES = [  # the sentence names the last word
    "--dataset no.jsonl",
    "--dataset broken.jsonl",
    "--dataset numbers.jsonl",
    "--dataset rows.jsonl.gz",
    "--dataset saved",  # which of its splits?
    "--dataset messages.jsonl",  # without a tokenizer
    f"--dataset messages.jsonl {OWN}",  # which has no template
    f"--dataset messages.jsonl {OWN} --chat-template t.jinja",  # which changes turns
    f"{OWN} --chat-template no.jinja",
    f"{OWN} --chat-template t.jinja",  # for texts
    "--tokenizer full",
    "--map prompt=a",
    "--split other",
    "--output-dir full",
    "--overwrite --dataset full --output-dir full",
]


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_told_in_a_sentence_that_names_flag_or_file(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", PAIRS)
    write_rows(tmp_path / "full/train.jsonl", PAIRS)
    write_rows(tmp_path / "messages.jsonl", [{"messages": [say("user", "Hi"), YES]}] * 3)
    write_rows(tmp_path / "numbers.jsonl", [*PAIRS, {**PAIRS[0], "prompt": 7}])
    (tmp_path / "broken.jsonl").write_text(json.dumps(PAIRS[0]) + "\n{broken\n")
    (tmp_path / "t.jinja").write_text("{{ messages | length }}{{ messages[-1]['content'] }}")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b"rows")[:-4])
    splits = {name: Dataset.from_list(PAIRS) for name in ("train_a", "train_b")}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    options = ["--dataset", "rows.jsonl", "--output-dir", "out", *flags.split()]
    with pytest.raises((UserError, OSError)) as error:
        main(tyro.cli(Args, args=options))
    assert flags.split()[-1] in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and lines(tmp_path / "full/train.jsonl") == PAIRS


def test_a_run_shows_two_rows_with_ids_and_the_share_of_long_texts(chat, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(chat)
    rows = [{**row, "prompt": f"\n\x1b{row['prompt']}", "rejected": " No." * 40} for row in PAIRS]
    write_rows(tmp_path / "rows.jsonl", rows)
    limit = len(tokenizer(" Yes.", add_special_tokens=False).input_ids) + 1
    flags = ["--dataset", "rows.jsonl", "--tokenizer", chat, "--output-dir", "out"]
    limits = ["--max-prompt-tokens", 2, "--max-response-tokens", limit]
    said = run("prepare_data", *flags, *limits, cwd=tmp_path)
    lengths = json.loads((tmp_path / "out/info.json").read_text())["lengths"]
    assert lengths["chosen"]["longest"] == lengths["chosen"]["5 %"] == limit
    assert [lengths[name]["over the limit"] for name in rows[0]] == [1, 0, 1]
    assert all(character.isprintable() or character == "\n" for character in said)
    assert said.count(f"[<s> {tokenizer.bos_token_id}]") == 2
    assert said.count(f"[{EOS} {tokenizer.eos_token_id}]") == 4
    assert "--overwrite" in refused("prepare_data", *flags, cwd=tmp_path)
