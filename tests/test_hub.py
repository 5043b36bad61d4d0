"""Models and data of the hub, in a cache with the layout of the public ones: resolved and read by
the libraries' own code, without a network."""

import json
import re
import shutil

import datasets
import pytest
import torch
from conftest import OFFLINE, ONLINE, SHORT, TINY, Nursery, build, lines, run
from datasets.packaged_modules.parquet.parquet import Parquet
from transformers import AutoModelForCausalLM

END = "<|endoftext|>"


def save_in_hub(name, model, hub, tokenizer_config, added=()):
    """A repository in the layout of the hub's cache, with files as the public ones have them."""
    repository = hub / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots/0123456789abcdef"
    model.save_pretrained(folder)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123456789abcdef")
    tokenizer = json.loads((TINY / "sft/tokenizer.json").read_text())
    tokenizer["added_tokens"] += added
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False}
    config |= {key: END for key in ("bos_token", "eos_token", "unk_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **tokenizer_config}))
    return folder


def save_public_models(hub):
    """A policy whose generation_config has no end, a reward model of 16 bits with a [PAD]."""
    special = {"vocab_size": 784, "bos_token_id": 0, "eos_token_id": 0}  # more than it has tokens
    policy = build("gpt_neox", "policy", seed=1, **special, max_position_embeddings=512)
    folder = save_in_hub("trl-lib/pythia-1b-deduped-tldr-sft", policy, hub, {})
    (folder / "generation_config.json").write_text('{"bos_token_id": 0}')
    reward = build("gpt_neox", "score", seed=2, **special, max_position_embeddings=512).half()
    pad = {"id": 768, "content": "[PAD]", "special": True, "normalized": False}
    pad |= {"single_word": False, "lstrip": False, "rstrip": False}
    name = "cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr"
    folder = save_in_hub(name, reward, hub, {"pad_token": "[PAD]"}, [pad])
    assert "score.bias" not in reward.state_dict()
    torch.save(reward.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def save_public_data(folder, tmp_path):
    """Posts and news articles, as `datasets` keeps them."""
    files = {}
    for split, n in (("train", 30), ("validation", 12)):
        rows = []
        for i in range(n):
            prompt = f"SUBREDDIT: r/tea\n\nTITLE: {split} {i}\n\nPOST: Is tea good?\n\nTL;DR:"
            if split == "validation" and i % 2:
                prompt = f"TITLE: news {i}\n\nPOST: Tea is good.\n\nTL;DR:"
            rows.append({"prompt": prompt, "chosen": " Tea.", "rejected": " No."})
        files[split] = [str(tmp_path / f"{split}.parquet")]
        datasets.Dataset.from_list(rows).to_parquet(files[split][0])
    name = "tldr-preference"
    builder = Parquet(cache_dir=str(tmp_path), dataset_name=name, hash="0123", data_files=files)
    builder.download_and_prepare()
    shutil.copytree(builder.cache_dir, folder / f"trl-lib___{name}/default/0.0.0/0123")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Where processes start that find the public models and data in the cache of the hub."""
    home = tmp_path_factory.mktemp("home")
    save_public_models(home / "hub")
    save_public_data(home / "datasets", home / "built")
    caches = {"HF_HUB_CACHE": f"{home}/hub", "HF_DATASETS_CACHE": f"{home}/datasets"}
    return Nursery(HF_HOME=str(home), **caches)


@pytest.mark.parametrize("script", (*ONLINE, *OFFLINE))
def test_the_users_own_command_runs_to_the_end_with_nothing_prepared(script, hub, tmp_path):
    """--model pythia-1b, and sizes that suit a test."""
    sizes = [*SHORT[script], *"--num-updates 3 --eval-every 2 --max-response-tokens 16".split()]
    said = run(script, "--model", "pythia-1b", *sizes, cwd=tmp_path, nursery=hub)
    for name in ("trl-lib/pythia-1b-deduped-tldr-sft", "cleanrl/EleutherAI_pythia-1b-deduped"):
        assert name in said
    counted = {line.split()[0]: line for line in said.splitlines() if " dropped" in line.lower()}
    if script in ONLINE:  # the news articles are counted
        assert re.findall(r"\d+", counted["held-out"])[:4] == ["6", "12", "0", "6"]
    else:
        assert "6 examples" in counted["held-out"] and ": 6}" in counted["held-out"]
    folder = tmp_path / f"runs/{script}/tldr/pythia-1b"
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [1, 2, 3]
    points = lines(folder / "frontier.jsonl")
    assert points[0]["kl"] == 0 != points[-1]["kl"] and points[0]["reward_se"] > 0
    samples = lines(folder / "samples.jsonl")
    assert all(row["prompt"].startswith("SUBREDDIT") for row in samples)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.vocab_size == 784 and model.dtype == torch.float32


@pytest.mark.parametrize("script", ONLINE)
def test_for_other_sizes_the_stages_before_are_named(script, tmp_path):
    said = run(script, "--model", "pythia-410m", cwd=tmp_path, code=2)
    sentence = said.rpartition(f"{script}.py: ")[2]
    for named in ("sft.py", "reward_model.py", "--model pythia-410m", "--dataset tldr"):
        assert named in sentence
    assert list(tmp_path.iterdir()) == []
