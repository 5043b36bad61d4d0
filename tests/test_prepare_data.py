"""prepare_data.py: a dataset of any public form becomes the texts that the training scripts join, and nothing else."""

import gzip
import hashlib
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, run
from tokenizers import processors
from transformers import AutoTokenizer

from prepare_data import Args, UserError, main

EOS = "<|endoftext|>"
CHAT = "{{ bos_token }}{% for t in tools or [] %}<tool>{{ t['name'] }}{% endfor %}{% for m in messages %}"
CHAT += (
    "<{{ m['role'] }}>{{ m['content'] }}{% for key in m['about'] or [] %}({{ key }}){% endfor %}"
)
CHAT += "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"
PAIRS = [{"prompt": f"Say {i}.", "chosen": " Yes.", "rejected": " No."} for i in range(24)]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def part(text):
    return {"type": "text", "text": text}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A folder with tiny's tokenizer that adds a BOS itself, and a template that writes one, too."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/sft")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    post = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = post
    tokenizer.chat_template = CHAT
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(folder)
    return str(folder)


def lines(file):
    return [json.loads(line) for line in Path(file).read_bytes().decode().split("\n")[:-1]]


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class Result:
    """What main(Args(...)) wrote for this file, folder or list of rows."""

    def __init__(self, tmp_path, data, **options):
        if isinstance(data, list):
            data = write(tmp_path / "rows.jsonl", data)
        out = tmp_path / "out"
        main(Args(dataset=str(data), output_dir=str(out), overwrite=True, **options))
        self.train, self.test = lines(out / "train.jsonl"), lines(out / "test.jsonl")
        self.rows = sorted(self.train + self.test, key=lambda row: row["prompt"])
        self.info = json.loads((out / "info.json").read_text())
        self.dropped = self.info["counts"]["train"]["dropped"]


def test_files_of_all_kinds_give_the_same_texts(tmp_path):
    data, rows = datasets.Dataset.from_list(PAIRS), PAIRS
    data.to_parquet(tmp_path / "rows.parquet")
    data.to_csv(tmp_path / "rows.csv")
    large = pyarrow.schema([(name, pyarrow.large_string()) for name in rows[0]])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, large), tmp_path / "large.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/train.json").write_text(json.dumps(rows))
    text = "".join(
        json.dumps(dict(reversed(row.items())) | {"score": i}) + "\r\n"
        for i, row in enumerate(rows)
    )
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    data.save_to_disk(tmp_path / "saved")
    expected = Result(tmp_path, PAIRS)
    assert expected.rows == sorted(PAIRS, key=lambda row: row["prompt"])
    for name in "rows.parquet rows.csv large.parquet rows.json folder marked.jsonl rows.jsonl.gz saved".split():
        found = Result(tmp_path, tmp_path / name)
        assert (found.train, found.test) == (expected.train, expected.test), name


def test_what_is_written_is_utf_8_with_one_line_a_row_and_text_columns_alone(tmp_path):
    rows = [{**row, "prompt": f"Größe {i}\u2028?", "id": i} for i, row in enumerate(PAIRS)]
    Result(tmp_path, rows)
    text = (tmp_path / "out/train.jsonl").read_bytes().decode() + (
        tmp_path / "out/test.jsonl"
    ).read_bytes().decode()
    assert "Größe 7\u2028?" in text and "\r" not in text and text.count("\n") == 24
    assert {tuple(json.loads(line)) for line in text.split("\n")[:-1]} == {
        ("prompt", "chosen", "rejected")
    }


def test_texts_that_look_like_dates_or_numbers_or_nulls_stay_texts(tmp_path):
    words = ["2024-01-01T00:00:00", "12", "NA", "null", "nan", "1e5"]
    rows = [{"prompt": word, "completion": word} for word in words]
    (tmp_path / "rows.csv").write_text(
        "prompt,completion\n" + "".join(f"{word},{word}\n" for word in words)
    )
    for data in (rows, tmp_path / "rows.csv"):
        assert {row["completion"] for row in Result(tmp_path, data).rows} == set(words)


@pytest.mark.parametrize(
    "names, split, expected",
    [
        ("train test validation", "", "train test"),
        ("train validation", "", "train validation"),
        ("train valid", "", "train valid"),
        ("train test valid1 valid2", "", "train test"),
        ("train_prefs test_prefs", "", "train_prefs test_prefs"),
        ("train_prefs train_sft test_prefs", "train_prefs,test_prefs", "train_prefs test_prefs"),
        ("train test", "test", "test"),
        ("only", "", "only"),
    ],
)
def test_splits_go_by_their_names_or_by_the_flag(names, split, expected, tmp_path):
    data = {
        name: datasets.Dataset.from_list([{"prompt": f"{name} {i}"} for i in (1, 2)])
        for name in names.split()
    }
    datasets.DatasetDict(data).save_to_disk(tmp_path / "saved")
    found = Result(tmp_path, tmp_path / "saved", split=split)
    train, *test = expected.split()
    assert {row["prompt"].split()[0] for row in found.train} == {train}
    assert {row["prompt"].split()[0] for row in found.test} == {*test} or {train}
    assert len(found.rows) == 2 * len(expected.split())


def test_the_subset_of_a_folder_that_has_several(tmp_path):
    folder = tmp_path / "data"
    for name in ("first", "second"):
        write(folder / name / "train.jsonl", [{"prompt": f"{name} {i}"} for i in range(4)])
    files = "".join(
        f"- config_name: {x}\n  data_files: {x}/train.jsonl\n" for x in ("first", "second")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    assert {row["prompt"][:6] for row in Result(tmp_path, folder, subset="second").rows} == {
        "second"
    }


def test_prompts_of_the_test_split_never_stay_in_the_train_split(tmp_path):
    write(tmp_path / "data/train.jsonl", PAIRS + PAIRS[:3])
    write(tmp_path / "data/validation.jsonl", PAIRS[:4])
    found = Result(tmp_path, tmp_path / "data")
    assert (found.train, found.test) == (PAIRS[4:], PAIRS[:4])
    assert found.info["counts"]["train"]["left out: prompt is in the test split"] == 7


def test_a_prompt_is_held_out_by_its_hash_in_every_dataset_and_order(tmp_path):
    rows = [
        {"prompt": f"Say {i}.", "chosen": f"{j}", "rejected": "No."}
        for i in range(200)
        for j in range(2)
    ]
    first = Result(tmp_path, rows)
    held_out = {row["prompt"] for row in first.test}
    shares = {
        f"Say {i}.": int(hashlib.sha256(f"Say {i}.".encode()).hexdigest(), 16) / 2**256
        for i in range(200)
    }
    assert held_out == {prompt for prompt, share in shares.items() if share < 0.1}
    assert len(first.test) == 2 * len(held_out) and not held_out & {
        row["prompt"] for row in first.train
    }
    second = Result(tmp_path, [{"prompt": row["prompt"]} for row in reversed(rows[100:])])
    assert {row["prompt"] for row in second.test} == held_out & {
        row["prompt"] for row in rows[100:]
    }
    assert 60 < len({row["prompt"] for row in Result(tmp_path, rows, held_out=0.4).test}) < 100
    for share in (0.001, 0.999):  # of three prompts at least one goes to each split
        found = Result(tmp_path, PAIRS[:3], held_out=share)
        assert min(len(found.train), len(found.test)) == 1 and len(found.rows) == 3


def test_the_dialogues_of_hh_are_split_at_their_last_answer(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Say {}.\n\nAssistant:"
    rows = [
        {"chosen": start.format(i) + " Yes.", "rejected": start.format(i) + " No."}
        for i in range(4)
    ]
    rows += [{"chosen": start.format(0) + " Yes.", "rejected": start.format(1) + " No."}]
    rows += [{"chosen": start.format(0), "rejected": start.format(0) + " No."}]
    found = Result(tmp_path, rows)
    assert found.rows == [
        {"prompt": start.format(i), "chosen": " Yes.", "rejected": " No."} for i in range(4)
    ]
    assert found.dropped == {"no common prompt": 1, "chosen is empty": 1}


def test_tldr_keeps_the_posts_of_reddit_alone(tmp_path):
    rows = [
        {**row, "prompt": f"{x}: {row['prompt']}"}
        for row in PAIRS[:8]
        for x in ("SUBREDDIT", "TITLE")
    ]
    write(tmp_path / "tldr-preference.jsonl", rows)
    found = Result(tmp_path, tmp_path / "tldr-preference.jsonl", strict=True)
    assert len(found.rows) == 8 and all(row["prompt"].startswith("SUBREDDIT") for row in found.rows)
    assert found.info["counts"]["train"]["left out: CNN/DM article, not a Reddit post"] == 8
    assert len(Result(tmp_path, rows).rows) == 16


SHAREGPT = {"user": "human", "assistant": "gpt"}
DIALOGUE_FORMS = {
    "no prompt": lambda x: {
        "chosen": [user(x), assistant("Yes.")],
        "rejected": [user(x), assistant("No.")],
    },
    "UltraFeedback": lambda x: (
        DIALOGUE_FORMS["no prompt"](x) | {"prompt": x, "messages": [user(x)], "score": 8.5}
    ),
    "whole dialogues": lambda x: DIALOGUE_FORMS["no prompt"](x) | {"prompt": [user(x)]},
    "all messages": lambda x: {
        "prompt": [user(x)],
        "chosen": [assistant("Yes.")],
        "rejected": [assistant("No.")],
    },
    "texts beside": lambda x: {"prompt": [user(x)], "chosen": "Yes.", "rejected": "No."},
    "one message": lambda x: {
        "prompt": x,
        "chosen": assistant("Yes."),
        "rejected": assistant("No."),
    },
    "ShareGPT": lambda x: (
        DIALOGUE_FORMS["texts beside"](x) | {"prompt": [{"from": "human", "value": x}]}
    ),
    "parts": lambda x: (
        DIALOGUE_FORMS["texts beside"](x) | {"prompt": [user([part(x[:2]), part(x[2:])])]}
    ),
}


@pytest.mark.parametrize("form", DIALOGUE_FORMS)
def test_preferences_of_messages_are_rendered_with_the_prompt_once(form, chat, tmp_path):
    rows = [DIALOGUE_FORMS[form](f"Say {i}.") for i in range(4)]
    expected = [
        {"prompt": f"<user>Say {i}.<assistant>", "chosen": "Yes.", "rejected": "No."}
        for i in range(4)
    ]
    found = Result(tmp_path, rows, tokenizer=chat)
    assert found.rows == expected
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert Result(tmp_path, tmp_path / "rows.parquet", tokenizer=chat).rows == expected


def test_a_dialogue_of_several_turns_and_its_completion(chat, tmp_path):
    """Of messages, of ShareGPT's conversations, of a prompt and a completion."""
    prompt = [user("Hi"), assistant("Yes?"), user("Say {}.")]
    forms = {"messages": [], "conversations": [], "completion": []}
    for i in range(3):
        said = [{**message, "content": message["content"].format(i)} for message in prompt]
        other = [
            {"from": SHAREGPT[m["role"]], "value": m["content"]} for m in [*said, assistant("Yes.")]
        ]
        forms["messages"].append({"messages": [*said, assistant("Yes.")], "prompt": "Hi"})
        forms["conversations"].append({"conversations": other})
        forms["completion"].append({"prompt": said, "completion": [assistant("Yes.")]})
    start = f"<user>Hi<assistant>Yes?{EOS}\n<user>Say {{}}.<assistant>"
    for rows in forms.values():
        found = Result(tmp_path, rows, tokenizer=chat)
        assert found.rows == [{"prompt": start.format(i), "completion": "Yes."} for i in range(3)]
    prompts = [{"messages": row["prompt"]} for row in forms["completion"]]
    found = Result(tmp_path, prompts, tokenizer=chat, map=("prompt=messages",))
    assert found.rows == [{"prompt": start.format(i)} for i in range(3)]
    with pytest.raises(
        UserError, match="row 1 of train: completion does not end with the assistant's answer"
    ):
        Result(tmp_path, prompts, tokenizer=chat)


def test_system_and_tools_beside_a_prompt_reach_the_template(chat, tmp_path):
    """In every row of the dataset, also those without a system message; tools may be JSON."""
    rows = [{"prompt": f"Say {i}.", "completion": "Yes."} for i in range(3)]
    rows[0].update(system="Be kind.", tools=[{"name": "clock", "unit": None}])
    rows[1].update(tools='[{"name": "map"}]')
    found = Result(tmp_path, rows, tokenizer=chat)
    starts = ["<tool>clock<system>Be kind.<user>Say 0.", "<tool>map<user>Say 1.", "<user>Say 2."]
    expected = [{"prompt": f"{start}<assistant>", "completion": "Yes."} for start in starts]
    assert found.rows == sorted(expected, key=lambda row: row["prompt"])


def test_keys_that_parquet_filled_with_null_are_left_out(chat, tmp_path):
    about = [{"about": {"first": "Ann"}}, {"about": {"last": "Bo"}}, {}]
    rows = [{"messages": [user(f"Say {i}.") | about[i], assistant("Yes.")]} for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = Result(tmp_path, tmp_path / "rows.parquet", tokenizer=chat)
    prompts = [
        "<user>Say 0.(first)<assistant>",
        "<user>Say 1.(last)<assistant>",
        "<user>Say 2.<assistant>",
    ]
    assert found.rows == [{"prompt": prompt, "completion": "Yes."} for prompt in prompts]


THINK = CHAT.replace("<assistant>{% endif %}", "<assistant><think>\n{% endif %}")
KEEPS = THINK.replace(
    "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think>\n{% endif %}{{ m['content'] }}"
)


@pytest.mark.parametrize(
    "template, start", [(THINK, "<assistant>"), (KEEPS, "<assistant><think>\n")]
)
def test_templates_that_open_a_thinking_block(template, start, chat, tmp_path):
    """Prompt and response together are what the template renders, whether it keeps the block or not."""
    (tmp_path / "t.jinja").write_text(template)
    rows = [{"prompt": [user(f"Say {i}.")], "chosen": "Yes.", "rejected": "No."} for i in range(3)]
    found = Result(tmp_path, rows, tokenizer=chat, chat_template=str(tmp_path / "t.jinja"))
    expected = [
        {"prompt": f"<user>Say {i}.{start}", "chosen": "Yes.", "rejected": "No."} for i in range(3)
    ]
    assert found.rows == expected


def test_texts_stay_as_they_are_less_what_the_tokenizer_adds(chat, tmp_path):
    rows = [
        {"prompt": f"<s>Say {i}.", "chosen": f" Yes.{EOS}", "rejected": " No.\n"} for i in range(3)
    ]
    rows[2]["chosen"] = f" Yes.{EOS} Or{EOS}"
    found = Result(tmp_path, rows, tokenizer=chat)
    assert found.rows == [
        {"prompt": f"Say {i}.", "chosen": " Yes.", "rejected": " No.\n"} for i in range(3)
    ]
    assert found.info["counts"]["train"]["cut at an EOS inside the response"] == 1


def test_columns_of_other_names_go_before_those_of_the_dataset(tmp_path):
    rows = [
        {"question": f"Say {i}.", "best": " Yes.", "chosen": " No.", "label": " Yes."}
        for i in range(3)
    ]
    found = Result(tmp_path, rows, map=("prompt=question", "chosen=best", "rejected=chosen"))
    assert found.rows == PAIRS[:3]
    found = Result(tmp_path, [{**PAIRS[i], **rows[i]} for i in range(3)], map=("completion=label",))
    assert found.rows == [{"prompt": f"Say {i}.", "completion": " Yes."} for i in range(3)]


BAD = {
    "prompt is missing": {"prompt": None},
    "prompt is empty": {"prompt": " \n"},
    "chosen is missing": {"chosen": None},
    "rejected is empty": {"rejected": ""},
    "chosen and rejected are equal": {"chosen": " No."},
    "chosen has half of a surrogate pair": {"chosen": "\ud83d"},
    "rejected is list, neither text nor messages": {"rejected": ["No."]},
}
BAD_MESSAGES = {
    "unknown role 'narrator' in prompt": {"prompt": [{"from": "narrator", "value": "Hi"}]},
    "a message has parts that are not text": {
        "chosen": [assistant([{"type": "image", "url": "x.png"}])]
    },
    "chosen is empty": {"chosen": [assistant("")]},
    "prompt is missing": {"prompt": None},
    "rejected does not end with the assistant's answer": {"rejected": [user("No.")]},
    "no common prompt": {"chosen": [user("A"), user("Say 0."), assistant("Yes.")]},
    "chosen is a whole dialogue that does not hold the prompt": {
        "chosen": [user("A"), assistant("Yes.")]
    },
}


@pytest.mark.parametrize("bad, is_chat", [(BAD, False), (BAD_MESSAGES, True)])
def test_rows_that_cannot_be_used_are_dropped_by_reason_and_shown_or_refused(
    bad, is_chat, chat, tmp_path, capsys
):
    good = [{**row, "prompt": [user(row["prompt"])]} if is_chat else row for row in PAIRS[:3]]
    rows, tokenizer = (
        good + [{**good[0], **change} for change in bad.values()],
        chat if is_chat else "",
    )
    found = Result(tmp_path, rows, tokenizer=tokenizer)
    assert len(found.rows) == 3 and found.dropped == dict.fromkeys(bad, 1)
    said = capsys.readouterr().out
    for number, reason in enumerate(bad, 4):
        assert f"row {number} of train: {reason}" in said
    with pytest.raises(UserError, match="--strict: row 4 of train"):
        Result(tmp_path, rows, tokenizer=tokenizer, strict=True)


TINY = ["--tokenizer", f"{ROOT}/tiny/sft"]
MISTAKES = {
    "no.jsonl": ("--dataset no.jsonl", []),
    "broken.jsonl": ("broken.jsonl: line 2", ["--dataset", "broken.jsonl"]),
    "rows.txt": ("--dataset rows.txt", ["--dataset", "rows.txt"]),
    "numbers": ("row 2 of train: prompt is 7, of type int", ["--dataset", "numbers.jsonl"]),
    "messages": ("--tokenizer", ["--dataset", "messages.jsonl"]),
    "changes": (
        "t.jinja changes",
        ["--dataset", "messages.jsonl", *TINY, "--chat-template", "t.jinja"],
    ),
    "template": (f"--tokenizer {ROOT}/tiny/sft", ["--dataset", "messages.jsonl", *TINY]),
    "no template": ("no.jinja", [*TINY, "--chat-template", "no.jinja"]),
    "tokenizer": ("--tokenizer none", ["--tokenizer", "none"]),
    "map": ("--map prompt=a", ["--map", "prompt=a"]),
    "no columns": ("--map", ["--dataset", "other.jsonl"]),
    "split": ("--split none", ["--split", "none"]),
    "ambiguous": ("train_a, train_b", ["--dataset", "saved"]),
    "empty": ("empty.jsonl", ["--dataset", "empty.jsonl"]),
    "share": ("--held-out 1.0", ["--held-out", "1.0"]),
    "held": ("--output-dir full", ["--output-dir", "full"]),
    "file": ("--output-dir rows.txt", ["--output-dir", "rows.txt"]),
    "itself": ("--output-dir full", ["--dataset", "full", "--output-dir", "full", "--overwrite"]),
    "inside": ("--output-dir full/new", ["--dataset", "full", "--output-dir", "full/new"]),
    "template file": ("--chat-template rows.gz", [*TINY, "--chat-template", "rows.gz"]),
    "cut short": ("rows.jsonl.gz", ["--dataset", "rows.jsonl.gz"]),
    "parquet": ("--dataset rows.parquet", ["--dataset", "rows.parquet"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_sentence_that_names_flag_or_file(case, tmp_path, monkeypatch):
    write(tmp_path / "rows.jsonl", PAIRS)
    write(tmp_path / "full/train.jsonl", PAIRS)
    write(tmp_path / "messages.jsonl", [{"messages": [user("Hi"), assistant("Yes.")]}] * 3)
    write(tmp_path / "numbers.jsonl", [PAIRS[0], {**PAIRS[1], "prompt": 7}])
    write(tmp_path / "other.jsonl", [{"a": "b"}])
    (tmp_path / "broken.jsonl").write_text(json.dumps(PAIRS[0]) + "\n{broken\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "t.jinja").write_text("{{ messages | length }}{{ messages[-1]['content'] }}")
    for name in ("rows.txt", "rows.gz", "rows.jsonl.gz", "rows.parquet"):
        (tmp_path / name).write_bytes(gzip.compress(b"rows")[:-4])
    splits = {name: datasets.Dataset.from_list(PAIRS) for name in ("train_a", "train_b")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    wanted, flags = MISTAKES[case]
    name = "no.jsonl" if case == "no.jsonl" else "rows.jsonl"
    said = run(
        "prepare_data", "--dataset", name, "--output-dir", "out", *flags, cwd=tmp_path, code=2
    )
    assert said.startswith("prepare_data.py: ") and said.count("\n") == 1 and wanted in said
    assert not (tmp_path / "out").exists() and lines(tmp_path / "full/train.jsonl") == PAIRS


def test_a_run_shows_two_rows_with_ids_and_lengths_and_keeps_other_files(chat, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(chat)
    rows = [
        {"prompt": f"Say\n{i}\x1b.", "chosen": " Yes.", "rejected": " No." * 40} for i in range(4)
    ]
    write(tmp_path / "rows.jsonl", rows)
    write(tmp_path / "out/mine.txt", [])
    flags = ["--dataset", "rows.jsonl", "--tokenizer", chat, "--output-dir", "out", "--overwrite"]
    count = len(tokenizer(" No." * 40, add_special_tokens=False).input_ids) + 1
    limits = ["--max-prompt-tokens", 2, "--max-response-tokens", count - 1]
    said = run("prepare_data", *flags, *limits, cwd=tmp_path)
    assert all(character.isprintable() or character == "\n" for character in said)
    assert (
        said.count(f"[<s> {tokenizer.bos_token_id}]") == 2
        and said.count(f"[{EOS} {tokenizer.eos_token_id}]") == 4
    )
    lengths = json.loads((tmp_path / "out/info.json").read_text())["lengths"]
    assert lengths["rejected"]["longest"] == lengths["rejected"]["5 %"] == count
    assert [lengths[name]["over the limit"] for name in ("prompt", "chosen", "rejected")] == [
        1,
        0,
        1,
    ]
    again = Result(tmp_path, tmp_path / "rows.jsonl", tokenizer=chat, max_response_tokens=count)
    assert again.info["lengths"]["rejected"]["over the limit"] == 0
    assert (tmp_path / "out/mine.txt").exists()
