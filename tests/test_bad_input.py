"""A user's mistakes: told in a sentence that names flag or file, before anything is written."""

import json
import shutil

import pytest
from conftest import EVERY, ONLINE, SCORED, SHORT, build, save
from scripts import TINY, refused, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer


def write_data(folder):
    answers = {"completion": " Okay.", "chosen": " Okay. Fine.", "rejected": " Not this."}
    rows = [{"prompt": f"\n\nHuman: Say {i}.\n\nAssistant:", **answers} for i in range(24)]
    write_rows(folder / "ok/train.jsonl", rows[4:])
    write_rows(folder / "ok/test.jsonl", rows[:4])
    write_rows(folder / "one_row.jsonl", rows[:1])
    write_rows(folder / "misnamed.jsonl", [{"question": "What?", "answer": "That."}] * 20)
    (folder / "broken.jsonl").write_text(json.dumps(rows[0]) + '\n{"prompt": "Hi"\n')
    (folder / "broken.json").write_text('[{"prompt": "Hi"')
    (folder / "empty.jsonl").write_text("")
    (folder / "latin.jsonl").write_bytes(b'{"prompt": "N\xe9"}\n')
    (folder / "no.parquet").write_text(json.dumps(rows[0]))
    (folder / "reward.py").write_text("def f(prompts, responses):\n    return [0] * len(prompts)\n")
    (folder / "file").write_text("mine")
    for name, content in (("full/notes", "mine"), ("other_program/args", '{"lr": 0.1}')):
        (folder / name).parent.mkdir()
        (folder / f"{name}.json").write_text(content)
    (folder / "other_program/model").mkdir()
    (folder / "other_program/model/notes.txt").write_text("mine")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with data and models, of which most cannot be used."""
    folder = tmp_path_factory.mktemp("inputs")
    write_data(folder)
    policy = AutoModelForCausalLM.from_pretrained(TINY / "sft", num_labels=1)
    no_end, larger = (AutoTokenizer.from_pretrained(TINY / "sft") for _ in range(2))
    no_end.eos_token = None
    save(policy, folder / "no_end", no_end)
    policy.save_pretrained(folder / "no_tokenizer")
    shutil.copytree(TINY / "sft", folder / "cut_short")
    weights = (folder / "cut_short/model.safetensors").read_bytes()
    (folder / "cut_short/model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "no_model").mkdir()
    larger.add_tokens(["<one>"])
    policy.resize_token_embeddings(769)
    save(policy, folder / "larger", larger)
    save(build("gpt2", "policy", seed=1, vocab_size=768), folder / "gpt2")
    for name, labels in (("two_outputs", 2), ("other_tokens", 1)):
        save(build("gpt_neox", "score", 1, vocab_size=768, num_labels=labels), folder / name)
    file = folder / "other_tokens/tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(content))
    return folder


GIVEN = "--reward-fn in/reward.py:f"
SOME = ("p3o_v2", "dpo")  # what they share is the same text in the others
MISTAKES = [  # scripts, flags, what the sentence names
    # data
    (EVERY, "--max-prompt-tokens 1", "in/ok"),
    ((*SOME, "sft"), "--dataset nothing.jsonl", "nothing.jsonl"),
    ((*SOME, "sft"), "--dataset in/broken.jsonl", "in/broken.jsonl"),
    ((*SOME, "sft"), "--dataset in/misnamed.jsonl", "in/misnamed.jsonl"),
    (["p3o_v2"], "--dataset no/such-data", "no/such-data"),
    (["p3o_v2"], "--dataset in/broken.json", "in/broken.json"),
    (["p3o_v2"], "--dataset in/empty.jsonl", "in/empty.jsonl"),
    (["dpo"], "--dataset in/latin.jsonl", "in/latin.jsonl"),
    (["dpo"], "--dataset in/no.parquet", "in/no.parquet"),
    (["sft"], "--dataset in/one_row.jsonl", "in/one_row.jsonl"),
    # models
    (SCORED, f"--model in/gpt2 --max-response-tokens 64 {GIVEN}", "in/ok"),
    (["sft", "reward_model"], "--model in/gpt2 --max-response-tokens 80", "in/ok"),
    (SCORED, f"--model in/no_end {GIVEN}", "in/no_end"),
    (["sft", "reward_model"], "--model in/no_end", "in/no_end"),
    (SOME, f"--model no/such-model {GIVEN}", "no/such-model"),
    (["sft"], "--model no/such-model", "no/such-model"),
    (["reward_model"], "--model no/such-model", ""),  # it is named on a line before
    (["sft"], "--model in/no_model", "in/no_model"),
    (["dpo"], "--model in/cut_short", "in/cut_short"),
    (["dpo"], "--model in/no_tokenizer", "in/no_tokenizer"),
    # numbers
    (EVERY, "--minibatch-size 0", "--minibatch-size"),
    (ONLINE, "--minibatch-size 3", "--minibatch-size 3"),
    ([script for script in ONLINE if script != "ppo"], "--num-responses 1", "--num-responses 1"),
    (["p3o_v2"], "--beta nan", "--beta"),
    (["p3o_v2"], "--temperature 0", "--temperature"),
    (["p3o_v1"], "--clip-range -1", "--clip-range"),
    (["ipo"], "--tau 0", "--tau"),
    (["mpo"], "--ref-samples-per-prompt 0", "--ref-samples-per-prompt"),
    (["reward_model"], "--eval-prompts 0", "--eval-prompts"),
    # rewards
    (SCORED, "--reward-fn nowhere.py:f", "nowhere.py"),
    (ONLINE, "--model pythia-410m", "reward_model.py"),
    (["dpo"], "--reward-fn in/reward.py", "in/reward.py"),
    (SOME, "--gold-fn in/reward.py:g", "in/reward.py:g"),
    (SOME, "--reward-model in/larger", "in/larger"),  # it has no score
    (SOME, "--reward-model in/two_outputs", "in/two_outputs"),
    (SOME, "--reward-model in/other_tokens", "in/other_tokens"),
    (["p3o_v2"], "--reward-model no/such-model", "no/such-model"),
    (["p3o_v2"], f"--model in/larger --reward-model {TINY}/reward_model", f"{TINY}/reward_model"),
    # folders of others
    (EVERY, "--output-dir in/full", "in/full"),
    (EVERY, "--output-dir in/file", "in/file"),
    (["p3o_v2"], "--output-dir in/full --overwrite", "in/full"),
    (["sft"], "--output-dir in/full --resume", "in/full"),
    (["dpo"], "--output-dir in/other_program --overwrite", "in/other_program"),
    (["p3o_v2"], "--output-dir in/other_program --resume", "in/other_program"),
]
CASES = [(script, *case) for scripts, *case in MISTAKES for script in scripts]


@pytest.mark.parametrize("script, flags, named", CASES)
def test_a_mistake_is_told_before_anything_is_written(script, flags, named, inputs, tmp_path):
    if "--output-dir" in flags:
        shutil.copytree(inputs, tmp_path / "in", ignore=shutil.ignore_patterns("*.safetensors"))
    else:
        (tmp_path / "in").symlink_to(inputs)
    options = ["--num-updates", 1, *SHORT[script], "--dataset", "in/ok", *flags.split()]
    assert named in refused(script, *options, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
