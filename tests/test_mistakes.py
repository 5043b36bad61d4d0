"""Mistakes of a user: each is told in one sentence that names the flag or the file, with exit code
2, before anything is written."""

import copy
import json
import shutil
from collections import deque

import pytest
import torch
from conftest import (
    EVERY,
    OFFLINE,
    ONLINE,
    SHORT,
    STAGES,
    TINY,
    Script,
    build,
    contents,
    save,
    write_rows,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
)


def write_data(folder):
    rows = []
    for i in range(24):
        prompt = f"\n\nHuman: How do I make tea? Say {i}.\n\nAssistant:"
        answers = {"completion": " Okay.", "chosen": " Okay. Fine.", "rejected": " Not this."}
        rows.append({"prompt": prompt, **answers})
    write_rows(folder / "ok/train.jsonl", rows[4:])
    write_rows(folder / "ok/test.jsonl", rows[:4])
    write_rows(folder / "one_row.jsonl", rows[:1])
    write_rows(folder / "misnamed.jsonl", [{"question": "What?", "answer": "That."}] * 20)
    messages = [{"role": "user", "content": "Hi"}]
    write_rows(folder / "messages.jsonl", [dict.fromkeys(rows[0], messages)] * 20)
    (folder / "broken.jsonl").write_text(json.dumps(rows[0]) + '\n{"prompt": "Hi"\n')
    (folder / "broken.json").write_text('[{"prompt": "Hi"')
    (folder / "empty.jsonl").write_text("")
    (folder / "latin.jsonl").write_bytes(b'{"prompt": "N\xe9"}\n')
    (folder / "no.parquet").write_text(json.dumps(rows[0]))
    (folder / "reward.py").write_text("def f(prompts, responses):\n    return [0] * len(prompts)\n")
    (folder / "file").write_text("mine")
    (folder / "full").mkdir()
    (folder / "full/notes.txt").write_text("mine")
    (folder / "other_program/model").mkdir(parents=True)
    (folder / "other_program/args.json").write_text('{"lr": 0.1}')
    (folder / "other_program/model/notes.txt").write_text("mine")


def write_models(folder):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "sft")
    policy = AutoModelForCausalLM.from_pretrained(TINY / "sft", dtype=torch.float32)
    no_end, larger = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    no_end.eos_token = None
    save(policy, folder / "no_end", no_end)
    policy.save_pretrained(folder / "no_tokenizer")
    shutil.copytree(folder / "no_end", folder / "cut_short")
    weights = (folder / "cut_short/model.safetensors").read_bytes()
    (folder / "cut_short/model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "no_model").mkdir()
    larger.add_tokens(["<one>"])
    policy.resize_token_embeddings(769)
    save(policy, folder / "larger", larger)
    save(build("gpt2", "policy", seed=1, vocab_size=768), folder / "gpt2")
    for name, labels in (("two_outputs", 2), ("other_tokens", 1)):
        config = GPTNeoXConfig.from_pretrained(TINY / "sft", num_labels=labels)
        save(GPTNeoXForSequenceClassification(config), folder / name)
    file = folder / "other_tokens/tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_data(folder)
    write_models(folder)
    return folder


GIVEN = "--reward-fn in/reward.py:f"
SCORED = (*ONLINE, *OFFLINE)
SOME = ("p3o_v2", "dpo", "sft")  # what they share is the same text in the others
# script, flags, what the sentence names
MISTAKES = [
    # data
    *[(script, "--dataset nothing.jsonl", "nothing.jsonl") for script in EVERY],
    *[(script, "--dataset in/messages.jsonl", "prepare_data.py") for script in EVERY],
    *[(script, "--max-prompt-tokens 1", "in/ok") for script in EVERY],
    *[(script, "--dataset in/broken.jsonl", "in/broken.jsonl") for script in SOME],
    *[(script, "--dataset in/misnamed.jsonl", "in/misnamed.jsonl") for script in SOME],
    ("p3o_v2", "--dataset no/such-data", "no/such-data"),
    ("p3o_v2", "--dataset in/broken.json", "in/broken.json"),
    ("p3o_v2", "--dataset in/empty.jsonl", "in/empty.jsonl"),
    ("dpo", "--dataset in/latin.jsonl", "in/latin.jsonl"),
    ("dpo", "--dataset in/no.parquet", "in/no.parquet"),
    ("sft", "--dataset in/one_row.jsonl", "in/one_row.jsonl"),
    # models
    *[(script, f"--model no/such-model {GIVEN}", "no/such-model") for script in SCORED],
    *[(script, "--model no/such-model", "no/such-model") for script in STAGES],
    *[(script, f"--model in/no_end {GIVEN}", "in/no_end") for script in SCORED],
    *[(script, "--model in/no_end", "in/no_end") for script in STAGES],
    *[(x, f"--model in/gpt2 --max-response-tokens 64 {GIVEN}", "in/ok") for x in SCORED],
    *[(script, "--model in/gpt2 --max-response-tokens 80", "in/ok") for script in STAGES],
    ("sft", "--model in/no_model", "in/no_model"),
    ("dpo", "--model in/cut_short", "in/cut_short"),
    ("dpo", "--model in/no_tokenizer", "in/no_tokenizer"),
    # numbers
    *[(script, "--minibatch-size 0", "--minibatch-size") for script in EVERY],
    *[(script, "--minibatch-size 3", "--minibatch-size 3") for script in ONLINE],
    *[(script, "--num-responses 1", "--num-responses 1") for script in ONLINE if script != "ppo"],
    *[(script, "--beta -1", "--beta") for script in (*ONLINE, "dpo", "mpo")],
    *[(script, "--tau -1", "--tau") for script in ("ipo", "mpo")],
    ("p3o_v2", "--seed -1", "--seed"),
    ("p3o_v2", "--beta nan", "--beta"),
    ("p3o_v2", "--temperature 0", "--temperature"),
    ("p3o_v1", "--clip-range -1", "--clip-range"),
    ("ppo", "--lam -1", "--lam"),
    ("dpo", "--label-smoothing -1", "--label-smoothing"),
    ("mpo", "--ref-samples-per-prompt 0", "--ref-samples-per-prompt"),
    ("sft", "--learning-rate -1", "--learning-rate"),
    ("sft", "--data-epochs -1", "--data-epochs"),
    ("reward_model", "--eval-prompts 0", "--eval-prompts"),
    ("reward_model", "--micro-batch-size -2", "--micro-batch-size"),
    # rewards
    *[(script, "--reward-model in/two_outputs", "in/two_outputs") for script in SCORED],
    *[(script, "--reward-fn nowhere.py:f", "nowhere.py") for script in SCORED],
    *[(script, "--model in/gpt2", "reward_model.py") for script in ONLINE],
    *[(script, "--reward-model in/other_tokens", "in/other_tokens") for script in SOME[:2]],
    *[(script, f"--reward-model {TINY}/sft", f"{TINY}/sft") for script in SOME[:2]],
    *[(script, "--gold-fn in/reward.py:g", "in/reward.py:g") for script in SOME[:2]],
    ("p3o_v2", "--reward-model no/such-model", "no/such-model"),
    ("p3o_v2", f"--model in/larger --reward-model {TINY}/reward_model", f"{TINY}/reward_model"),
    # folders of others
    *[(script, "--output-dir in/full", "in/full") for script in EVERY],
    ("p3o_v2", "--output-dir in/file", "in/file"),
    ("p3o_v2", "--output-dir in/full --overwrite", "in/full"),
    ("sft", "--output-dir in/full --resume", "in/full"),
    ("dpo", "--output-dir in/other_program --overwrite", "in/other_program"),
    ("p3o_v2", "--output-dir in/other_program --resume", "in/other_program"),
    # flags, which are tyro's to refuse
    *[(script, "--no-such-flag", "--no-such-flag") for script in SOME],
]


@pytest.fixture(scope="module")
def outcomes(inputs, tmp_path_factory):
    """{case: (exit code, output, folder where it ran)}, with `inputs` as in/; two at a time."""
    waiting, running, found = deque(MISTAKES), deque(), {}
    while waiting or running:
        while waiting and len(running) < 2:
            case = waiting.popleft()
            script, mistake, _ = case
            folder = tmp_path_factory.mktemp("case")
            if "--output-dir" in mistake:
                ignored = shutil.ignore_patterns("*.safetensors")
                shutil.copytree(inputs, folder / "in", ignore=ignored)
            else:
                (folder / "in").symlink_to(inputs)
            options = ["--num-updates", "1", *SHORT[script], "--dataset", "in/ok"]
            options += mistake.split()
            running.append((case, contents(folder), Script(script, *options, cwd=folder), folder))
        case, before, process, folder = running.popleft()
        found[case] = (*process.wait(), before, folder)
    return found


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: " ".join(case[:2]))
def test_a_mistake_is_told_in_a_sentence_before_anything_is_written(case, outcomes):
    code, said, before, folder = outcomes[case]
    script, mistake, named = case
    assert code == 2 and "Traceback" not in said, said
    if mistake == "--no-such-flag" or case[:2] == ("reward_model", "--model no/such-model"):
        assert named in said  # on one of the lines before
    else:
        before_it, _, sentence = said.partition(f"{script}.py: ")
        assert named in sentence and before_it[-1:] in ("", "\n"), said
    assert [path.name for path in folder.iterdir()] == ["in"]
    assert contents(folder) == before
