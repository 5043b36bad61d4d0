"""What users bring: data of many forms, chat templates, reward models with tokens of their own."""

import json
import re
import runpy
import shutil

import datasets
import pytest
import torch
from conftest import ROOT, run
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

import dpo
import p3o_v1

QUICK = {
    "p3o_v1": "--num-updates 1 --prompts-per-update 4 --minibatch-size 4 --num-epochs 1 --max-response-tokens 8 "
    "--eval-every 0 --eval-prompts 2",
    "dpo": "--num-updates 1 --minibatch-size 4 --eval-prompts 2 --max-response-tokens 16",
}
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
CHAT += "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"
PAIRS = [{"prompt": f"Say {i}.", "chosen": " Yes.", "rejected": " No."} for i in range(24)]
SAYS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "A cactus?"},
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/sft")
    tokenizer.chat_template = CHAT
    return tokenizer


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def assistant(text):
    return [{"role": "assistant", "content": text}]


def texts_of(tokenizer, dataset, script=dpo, columns=("chosen", "rejected"), **options):
    """The different rows, both parts together, as text with special tokens."""
    args = script.Args(dataset=str(dataset), **options)
    if script is p3o_v1:
        return {
            (tokenizer.decode(ids),)
            for part in script.load_prompts(tokenizer, args)
            for ids in part
        }
    parts = script.load_rows(tokenizer, [tokenizer.eos_token_id], args, columns)
    return {tuple(tokenizer.decode(ids) for ids in row.values()) for part in parts for row in part}


# ---------------------------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize("script", ["p3o_v1", "dpo"])
def test_columns_of_other_names(script, tmp_path):
    rows = [
        {"question": row["prompt"], "best": row["chosen"], "chosen": row["rejected"]}
        for row in PAIRS
    ]
    file, names = (
        jsonl(tmp_path / "rows.jsonl", rows),
        ["prompt=question", "chosen=best", "rejected=chosen"],
    )
    said = run(script, *QUICK[script].split(), "--dataset", file, "--map", *names, cwd=tmp_path)
    assert "22 train rows" in said or "22 different train prompts" in said


def test_files_of_all_kinds_hold_the_same(tokenizer, tmp_path):
    data = datasets.Dataset.from_list(PAIRS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(
        train=data.select(range(20)), test=data.select(range(20, 24))
    ).save_to_disk(tmp_path / "two")
    data.to_parquet(tmp_path / "rows.parquet")
    data.to_json(tmp_path / "rows.jsonl.gz", compression="gzip")
    expected = texts_of(tokenizer, jsonl(tmp_path / "rows.jsonl", PAIRS))
    assert len(expected) == 24
    for name in ("one", "two", "rows.parquet", "rows.jsonl.gz"):
        assert texts_of(tokenizer, tmp_path / name) == expected, name


def test_subset_and_split(tokenizer, tmp_path):
    """Of a folder that names its configurations as a hub page does."""
    folder = tmp_path / "data"
    for name, start in (("first", 0), ("second", 100)):
        (folder / name).mkdir(parents=True)
        for split, rows in (
            ("train", range(20)),
            ("other", range(50, 70)),
            ("test", range(80, 84)),
        ):
            jsonl(folder / name / f"{split}.jsonl", [{"prompt": f"Say {start + i}."} for i in rows])
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(
            f"  - split: {split}\n    path: {name}/{split}.jsonl\n"
            for split in ("train", "other", "test")
        )
        for name in ("first", "second")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    args = p3o_v1.Args(dataset=str(folder), subset="second", split="other")
    train, held_out = p3o_v1.load_prompts(tokenizer, args)
    assert set(tokenizer.batch_decode(train)) == {f"Say {i}." for i in range(150, 170)}
    assert set(tokenizer.batch_decode(held_out)) == {f"Say {i}." for i in range(180, 184)}
    args = p3o_v1.Args(dataset=str(folder), subset="second", split="test,other")
    train, held_out = p3o_v1.load_prompts(tokenizer, args)
    assert set(tokenizer.batch_decode(train)) == {f"Say {i}." for i in range(180, 184)}
    assert set(tokenizer.batch_decode(held_out)) == {f"Say {i}." for i in range(150, 170)}
    for split in ("train,all", "train,train", "train,test,other", "all"):
        args = p3o_v1.Args(dataset=str(folder), subset="first", split=split)
        told = f"--split {split}: --dataset .* has the splits train, other, test"
        with pytest.raises(p3o_v1.UserError, match=told):
            p3o_v1.load_prompts(tokenizer, args)


def test_a_response_that_has_an_end_gets_no_other(tokenizer, tmp_path):
    """The ends of the model's generation config count too."""
    (stop,) = tokenizer(".").input_ids
    shutil.copytree(ROOT / "tiny/sft", tmp_path / "model")
    GenerationConfig(eos_token_id=[0, stop]).save_pretrained(tmp_path / "model")
    file = jsonl(tmp_path / "rows.jsonl", [{**row, "rejected": " No"} for row in PAIRS])
    args = dpo.Args(model=str(tmp_path / "model"), dataset=str(file))
    model = AutoModelForCausalLM.from_pretrained(args.model)
    found = dpo.load_tokenizer(args.model, model, args)
    row = dpo.load_rows(*found, args, ("chosen", "rejected"))[0][0]
    texts = [tokenizer.decode(row[key]) for key in ("chosen", "rejected")]
    assert texts == [" Yes.", " No<|endoftext|>"]


@pytest.mark.parametrize(
    "script, columns",
    [(p3o_v1, ()), (dpo, ("chosen", "rejected"))],
)
def test_held_out_prompts_are_not_trained_on(script, columns, tokenizer, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    jsonl(tmp_path / "data/train.jsonl", [*PAIRS, *PAIRS[:3]])
    jsonl(tmp_path / "data/test.jsonl", PAIRS[:4])
    args = script.Args(dataset=str(tmp_path / "data"))
    if script is p3o_v1:
        parts = script.load_prompts(tokenizer, args)
    else:
        parts = (
            [row["prompt"] for row in part]
            for part in script.load_rows(tokenizer, [tokenizer.eos_token_id], args, columns)
        )
    train, held_out = map(tokenizer.batch_decode, parts)
    assert len(train) == 20 and len(held_out) == 4 and not {*train} & {*held_out}
    assert "7 train rows dropped: their prompts are held out" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ messages
FORMS = [
    lambda i: {
        "prompt": [*SAYS[:2], user(i)],
        "chosen": assistant("Yes."),
        "rejected": assistant("No."),
    },
    lambda i: {
        "chosen": [*SAYS[:2], user(i), *assistant("Yes.")],
        "rejected": [*SAYS[:2], user(i), *assistant("No.")],
    },
    lambda i: (
        {"prompt": [*SAYS[:2], user(i)]}
        | {
            key: [*SAYS[:2], user(i), *assistant(y)]
            for key, y in (("chosen", "Yes."), ("rejected", "No."))
        }
    ),
    lambda i: {"prompt": [*SAYS[:2], user(i)], "chosen": "Yes.", "rejected": "No."},
]


def user(i):
    return {"role": "user", "content": f"Say {i}."}


@pytest.mark.parametrize("form", FORMS)
def test_messages_are_rendered_by_the_template(form, tokenizer, tmp_path):
    """A response is what the template adds, with one end; a prompt ends where the response begins."""
    file, end = jsonl(tmp_path / "rows.jsonl", map(form, range(12))), "<|endoftext|>"
    start = f"<user>Hi<assistant>Yes?{end}\n<user>Say "
    expected = {(f"{start}{i}.<assistant>", f"Yes.{end}", f"No.{end}") for i in range(12)}
    assert texts_of(tokenizer, file) == expected
    assert texts_of(tokenizer, file, dpo, ("completion",)) == {row[:2] for row in expected}
    assert texts_of(tokenizer, file, p3o_v1, ()) == {row[:1] for row in expected}


def test_messages_without_a_template_are_refused_with_the_remedy(tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", map(FORMS[0], range(12)))
    flags = ["--dataset", file, "--chat-template"]
    said = run("p3o_v1", *flags[:2], cwd=tmp_path, code=2)
    assert "need a chat template, which the tokenizer lacks: pass --chat-template FILE" in said
    said = run("dpo", *flags, "no.jinja", cwd=tmp_path, code=2)
    assert "--chat-template no.jinja: no chat template is there" in said
    (tmp_path / "bad.jinja").write_text("{{ raise_exception('Roles must alternate') }}")
    said = run("dpo", *flags, "bad.jinja", cwd=tmp_path, code=2)
    assert "row 1 of train: TemplateError: Roles must alternate" in said


# ------------------------------------------------------------------------------------------------------- reward models
def a_tokenizer(kind):
    """Of an encoder ([CLS] x [SEP] y [SEP], all lower case), or a decoder with tokens other than tiny's."""
    if kind == "encoder":
        tokenizer, special = (
            Tokenizer(models.WordPiece(unk_token="[UNK]")),
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        )
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=120, special_tokens=special, show_progress=False
        )
    else:
        tokenizer, special = Tokenizer(models.BPE()), ["[END]"]
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    tokenizer.train_from_iterator((ROOT / "tiny/gold.py").read_text().splitlines(), trainer)
    if kind == "decoder":
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[END]")
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def a_reward_model(folder, kind, chat_template=None, **options):
    torch.manual_seed(1)
    tokenizer = a_tokenizer(kind)
    tokenizer.chat_template = chat_template
    options = {"vocab_size": len(tokenizer), "num_labels": 1} | options
    if kind == "encoder":
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        model = BertForSequenceClassification(BertConfig(**options, **sizes, initializer_range=0.5))
    else:
        sizes = {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 128,
            "initializer_range": 0.5,
        }
        model = GPT2ForSequenceClassification(GPT2Config(**options, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model.eval(), tokenizer


@pytest.mark.parametrize("script, kind", [("p3o_v1", "decoder"), ("dpo", "encoder")])
def test_a_reward_model_with_other_tokens_is_refused_with_the_remedy(script, kind, tmp_path):
    """The policy's ids would mean other words to it, however many tokens it has."""
    a_reward_model(tmp_path / "judge", kind, vocab_size=800)
    flags = ["--dataset", jsonl(tmp_path / "rows.jsonl", PAIRS), "--reward-model", "judge"]
    said = run(script, *flags, cwd=tmp_path, code=2)
    assert (
        "--reward-model judge: expected a score and the policy's 768 tokens, found 1 and 800 others; see docs"
        in said
    )


HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A cactus?\n\nAssistant:"
ROWS = [
    ("Hi", " Yes."),
    (HH, " Give it water, not often."),
    ("Why? " * 60, " No."),
]  # the last is too long for them
TURNS = ["A cactus?", "Give it water, not often."]


def an_example(tmp_path, kind, chat_template=None):
    """The example with the name of a reward model, and that model and its tokenizer."""
    folder, model, own = a_reward_model(tmp_path / "judge", kind, chat_template)
    code = (ROOT / "docs/examples/classifier.py").read_text()
    assert len(re.findall("^NAME = .*$", code, re.M)) == 1
    file = tmp_path / "judge.py"
    file.write_text(re.sub("^NAME = .*$", f"NAME = {str(folder)!r}", code, flags=re.M))
    return file, model, own


@pytest.fixture
def classifier(tmp_path):
    """The example's function of rows, and what it should give."""

    def load(*kind):
        file, model, own = an_example(tmp_path, *kind)
        score = runpy.run_path(file)["score"]
        return lambda rows: score(*map(list, zip(*rows))), model, own

    return load


def test_the_example_gives_an_encoder_pairs(classifier):
    score, model, own = classifier("encoder")
    expected = [model(**own(*row, return_tensors="pt")).logits.item() for row in ROWS]
    assert len({round(x, 3) for x in expected}) == 3
    assert score(ROWS) == pytest.approx(expected, rel=1e-5)
    assert score(ROWS[1:2]) == pytest.approx(expected[1:2], rel=1e-5)  # whatever else is scored


def test_the_example_gives_a_decoder_one_text_and_counts_what_it_cuts(classifier, capsys):
    score, model, own = classifier("decoder")
    ids = [own(x + y, return_tensors="pt").input_ids[:, -128:] for x, y in ROWS]
    assert score(ROWS) == pytest.approx([model(row).logits.item() for row in ids], rel=1e-5)
    assert "1 of 3 texts cut on the left to the 128 tokens that" in capsys.readouterr().out


def test_the_example_writes_dialogues_by_a_chat_template(classifier):
    score, model, own = classifier("decoder", CHAT)
    one = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    three = [
        {"role": r, "content": c}
        for r, c in zip(("user", "assistant") * 2, ("Hi", "Hello.", *TURNS))
    ]
    ids = [
        own.apply_chat_template(chat, return_tensors="pt", return_dict=True).input_ids
        for chat in (one, three)
    ]
    assert score(ROWS[:2]) == pytest.approx([model(row).logits.item() for row in ids], rel=1e-5)


def test_the_example_refuses_a_dialogue_that_another_template_wrote(classifier):
    score, _, _ = classifier("decoder", CHAT)
    with pytest.raises(ValueError, match="let as_read take it apart"):
        score([("system\nBe kind.\nuser\nHi\nassistant\n", "Yes.")])


@pytest.mark.parametrize("script, kind", [("p3o_v2", "encoder")])
def test_the_example_as_the_reward_of_a_run(script, kind, tmp_path):
    file, *_ = an_example(tmp_path, kind)
    flags = [
        "--dataset",
        jsonl(tmp_path / "rows.jsonl", PAIRS),
        "--output-dir",
        "run",
        "--reward-fn",
        f"{file}:score",
    ]
    run(script, *QUICK["p3o_v1"].split(), *flags, cwd=tmp_path)
    point = json.loads((tmp_path / "run/frontier.jsonl").read_text().splitlines()[0])
    assert point["reward_se"] > 0


# --------------------------------------------------------------------------------------------------- settings, the card
@pytest.mark.parametrize("content", [None, '{"args": 3}'])
def test_settings_that_are_no_runs(content, tmp_path):
    if content:
        (tmp_path / "args.json").write_text(content)
    said = run("p3o_v1", "--config", "args.json", cwd=tmp_path, code=2)
    assert "--config args.json: no run " in said


def test_a_run_with_the_settings_of_another_and_its_card(tmp_path):
    """Zeros, lists, switches and empty texts too."""
    given = (
        "--seed 3 --weight-decay 0 --adam-betas 0.8 0.9 --truncate-prompts --map rejected=chosen"
    )
    file = jsonl(tmp_path / "rows.jsonl", [{**row, "best": " Yes."} for row in PAIRS])
    flags = [*QUICK["dpo"].split(), "--dataset", file, *given.split(), "chosen=rejected"]
    run("dpo", *flags, "--output-dir", "first", cwd=tmp_path)
    run("dpo", "--config", "first/args.json", "--seed", 4, "--output-dir", "second", cwd=tmp_path)
    records = [json.loads((tmp_path / x / "args.json").read_text()) for x in ("first", "second")]
    first, second = (record["args"] for record in records)
    differing = {key for key in first if first[key] != second[key]}
    assert differing == {"seed", "output_dir", "config"} and second["seed"] == 4
    card = (tmp_path / "first/model/README.md").read_text()
    assert "# tiny, trained by dpo.py" in card and str(file) in card and "git_commit" in card
    (tmp_path / "typed.json").write_text(json.dumps({"args": first | {"seed": "many"}}))
    (tmp_path / "unknown.json").write_text(json.dumps({"args": first | {"speed": 3}}))
    assert "--seed" in run("dpo", "--config", "typed.json", cwd=tmp_path, code=2)
    assert "--speed" in run("dpo", "--config", "unknown.json", cwd=tmp_path, code=2)


def test_a_run_ends_when_its_kl_passes_the_target(tmp_path):
    """With its model saved and evaluated, as after its last update."""
    flags = [
        *QUICK["p3o_v1"].split(),
        "--num-updates",
        6,
        "--learning-rate",
        3e-3,
        "--target-kl",
        1e-6,
    ]
    said = run("p3o_v1", *flags, "--output-dir", "run", cwd=tmp_path)
    metrics = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert [row["objective/kl"] > 1e-6 for row in metrics] == [False] * (len(metrics) - 1) + [
        True
    ] and len(metrics) < 6
    assert f"ends after {len(metrics)} updates: the KL, " in said
    last = json.loads((tmp_path / "run/frontier.jsonl").read_text().splitlines()[-1])
    assert last["step"] == len(metrics) and (tmp_path / "run/model").is_dir()


def test_a_script_copied_elsewhere_says_where_tiny_is(tmp_path):
    shutil.copy(ROOT / "p3o_v1.py", tmp_path / "mine.py")
    said = run(tmp_path / "mine.py", cwd=tmp_path, code=2)
    assert (
        "tiny/ lies beside the scripts in the repository: pass --model, --dataset and --reward-fn."
        in said
    )
