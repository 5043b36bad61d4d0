"""docs/examples/classifier.py: a reward model with tokens of its own, as the reward of a run."""

import re
import runpy

import pytest
import torch
from conftest import ROOT, SHORT, lines, run
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
CHAT += "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A cactus?\n\nAssistant:"
ROWS = [
    ("Hi", " Yes."),
    (HH, " Give it water, not often."),
    ("Why? " * 60, " No."),  # too long for it
]
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DECODER = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}


def tokenizer_of(kind):
    """Of an encoder ([CLS] x [SEP] y [SEP], all lower case), or a decoder with its own tokens."""
    if kind == "encoder":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        trainer = trainers.WordPieceTrainer(
            vocab_size=120, special_tokens=special, show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["[END]"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator((ROOT / "tiny/gold.py").read_text().splitlines(), trainer)
    if kind == "decoder":
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[END]")
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture
def example(tmp_path):
    """example(kind) -> a copy of the file that names such a model, the model, its tokenizer."""

    def example(kind, chat_template=None):
        torch.manual_seed(1)
        tokenizer = tokenizer_of(kind)
        tokenizer.chat_template = chat_template
        options = {"vocab_size": len(tokenizer), "num_labels": 1, "initializer_range": 0.5}
        if kind == "encoder":
            model = BertForSequenceClassification(BertConfig(**options, **ENCODER))
        else:
            model = GPT2ForSequenceClassification(GPT2Config(**options, **DECODER))
        model.save_pretrained(tmp_path / "judge")
        tokenizer.save_pretrained(tmp_path / "judge")
        code = (ROOT / "docs/examples/classifier.py").read_text()
        code, changes = re.subn("^NAME = .*$", f"NAME = '{tmp_path}/judge'", code, flags=re.M)
        assert changes == 1
        (tmp_path / "judge.py").write_text(code)
        return tmp_path / "judge.py", model.eval(), tokenizer

    return example


def scores(file, rows):
    return runpy.run_path(file)["score"](*map(list, zip(*rows)))


@torch.no_grad()
def test_an_encoder_reads_pairs(example):
    file, model, tokenizer = example("encoder")
    expected = [model(**tokenizer(*row, return_tensors="pt")).logits.item() for row in ROWS]
    assert len({round(x, 3) for x in expected}) == 3
    assert scores(file, ROWS) == pytest.approx(expected, rel=1e-5)
    assert scores(file, ROWS[1:2]) == pytest.approx(expected[1:2], rel=1e-5)  # whatever else


@torch.no_grad()
def test_a_decoder_reads_one_text_and_what_is_cut_is_counted(example, capsys):
    file, model, tokenizer = example("decoder")
    ids = [tokenizer(x + y, return_tensors="pt").input_ids[:, -128:] for x, y in ROWS]
    expected = [model(row).logits.item() for row in ids]
    assert scores(file, ROWS) == pytest.approx(expected, rel=1e-5)
    assert "1 of 3 texts cut on the left to the 128 tokens that" in capsys.readouterr().out


@torch.no_grad()
def test_a_chat_template_writes_dialogues_and_those_of_another_are_refused(example):
    file, model, tokenizer = example("decoder", CHAT)
    says = [["Hi", "Yes."], ["Hi", "Hello.", "A cactus?", "Give it water, not often."]]
    expected = []
    for texts in says:
        roles = ("user", "assistant") * 2
        chat = [{"role": role, "content": text} for role, text in zip(roles, texts)]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True).input_ids
        expected.append(model(ids).logits.item())
    assert scores(file, ROWS[:2]) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="let as_read take it apart"):
        scores(file, [("system\nBe kind.\nuser\nHi\nassistant\n", "Yes.")])


def test_it_is_the_reward_of_a_run(example, data, tmp_path):
    file, *_ = example("encoder")
    options = ["--dataset", data, "--reward-fn", f"{file}:score", "--num-updates", 1]
    run("p3o_v2", *SHORT["p3o_v2"], *options, "--output-dir", "run", cwd=tmp_path)
    assert lines(tmp_path / "run/frontier.jsonl")[0]["reward_se"] > 0
