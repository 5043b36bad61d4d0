"""What users bring: data with columns of their own, as files of several kinds."""

import json

import pytest
from conftest import ROOT, run

QUICK = {
    "p3o_v2": "--num-updates 1 --prompts-per-update 4 --minibatch-size 4 --num-epochs 1 --max-response-tokens 8 "
    "--eval-every 0 --eval-prompts 2",
    "sft": "--num-updates 1 --minibatch-size 4 --eval-prompts 2",
    "reward_model": "--num-updates 1 --minibatch-size 4 --eval-prompts 2",
}


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("script", QUICK)
def test_columns_of_other_names(script, tmp_path):
    """--map gives the columns the script's names; two may even change places."""
    rows = [{"question": f"Say {i}.", "chosen": " No.", "best": " Yes."} for i in range(24)]
    names = ["prompt=question", "chosen=best", "rejected=chosen"]
    file = jsonl(tmp_path / "rows.jsonl", rows)
    said = run(script, *QUICK[script].split(), "--dataset", file, "--map", *names, cwd=tmp_path)
    assert "22 train rows" in said or "22 different train prompts" in said
    record = json.loads((tmp_path / f"runs/{script}/rows/tiny/args.json").read_text())
    assert record["args"]["map"] == names


def test_mapped_columns_hold_what_was_mapped(tmp_path):
    from transformers import AutoTokenizer

    import reward_model

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/sft")
    rows = [{"question": f"Say {i}.", "chosen": " No.", "best": " Yes."} for i in range(24)]
    names = ("prompt=question", "chosen=best", "rejected=chosen")
    args = reward_model.Args(dataset=str(jsonl(tmp_path / "rows.jsonl", rows)), map=names)
    train, held_out = reward_model.load_rows(tokenizer, args, ("chosen", "rejected"))
    for row in [*train, *held_out]:
        texts = {key: tokenizer.decode(ids, skip_special_tokens=True) for key, ids in row.items()}
        assert texts["prompt"].startswith("Say ") and (texts["chosen"], texts["rejected"]) == (" Yes.", " No.")
