"""What README.md and docs/ say: the flags exist, links lead somewhere, recipes run, figures are computed."""

import ast
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from conftest import build, run
from transformers import AutoConfig, AutoModelForCausalLM

import p3o_v1
import p3o_v2

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import memory  # noqa: E402
from random_model import config_of  # noqa: E402

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = (
    "accelerate",
    "torchrun",
    "hf",
    "transformers",
    "wandb",
    "pip",
    "tensorboard",
    "#SBATCH",
    "git",
    "make",
)
TINY = "--num-updates 1 --prompts-per-update 4 --minibatch-size 4 --num-epochs 1 --eval-prompts 4".split()
TINY += "--max-response-tokens 8".split()
each_doc = pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.name)


def flags_of(script):
    """The flags of a script: the fields of its Args, or what it gives to argparse."""
    text = script.read_text()
    found = {f"--{name}" for name in re.findall(r'"--([a-z-]+)"', text)}
    for node in ast.parse(text).body:
        if (
            isinstance(node, ast.ClassDef) and node.decorator_list
        ):  # Args; of evaluate.py one for each subcommand
            fields = [part.target.id for part in node.body if isinstance(part, ast.AnnAssign)]
            found |= {f"--{field.replace('_', '-')}" for field in fields}
    return found


FLAGS = {
    str(path.relative_to(ROOT)): flags_of(path)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmark/*.py")]
}
FLAGS["tiny/make.py"] = flags_of(ROOT / "tiny/make.py")
FLAGS["tests/blocks.py"] = flags_of(ROOT / "tests/blocks.py")
ANY = set().union(*FLAGS.values(), {"--help"})


def fences(text):
    """(language, code) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)


def commands(text):
    """What looks like a command or names a flag: lines of fenced blocks without a language, and code in sentences."""
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for language, code in fences(text):
        if not language:
            yield from re.sub(r"\\\n", " ", code).splitlines()
    yield from re.findall(r"`([^`\n]+)`", rest)


@each_doc
def test_every_flag_exists_in_the_script_it_is_given_to(doc):
    wrong = []
    for command in commands(doc.read_text()):
        command = re.sub(r"\s#\s.*", "", command)
        words = command.split()
        at = next((i for i, word in enumerate(words) if re.fullmatch(r"[\w/.]+\.py", word)), None)
        if at is None and words and words[0].startswith(TOOLS):
            continue
        known = FLAGS.get(words[at], ANY) | {"--help"} if at is not None else ANY
        words = words[at or 0 :]
        for word in words:
            found = re.match(r"[\"'(=]*(--[a-z][\w-]*)", word)
            wrong += [(command, found[1])] if found and found[1] not in known else []
    assert not wrong


def slugs(doc):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", doc.read_text(), flags=re.M | re.S), re.M
    )
    return {
        re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings
    }


@each_doc
def test_every_link_within_the_repository_leads_somewhere(doc):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", doc.read_text()):
        path, _, anchor = link.partition("#")
        target = (doc.parent / path).resolve() if path else doc
        if not re.match(r"https?:", link) and not (
            target.exists() and (not anchor or anchor in slugs(target))
        ):
            broken.append(link)
    assert not broken


def test_a_script_alone_works_elsewhere(tmp_path):
    script = shutil.copy(ROOT / "p3o_v2.py", tmp_path / "p3o_v2.py")
    shutil.copytree(ROOT / "tiny/sft", tmp_path / "policy")
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {n}:"}) + "\n" for n in range(30))
    )
    (tmp_path / "reward.py").write_text(
        "def f(prompts, responses):\n    return [float(len(y)) for y in responses]\n"
    )
    own = ["--model", "policy", "--dataset", "data.jsonl", "--reward-fn", "reward.py:f"]
    run(script, *TINY, *own, cwd=tmp_path)
    assert (tmp_path / "runs/p3o_v2/data.jsonl/policy/model").is_dir()


# ------------------------------------------------------------------------------------------------------- the recipes
RECIPES = (ROOT / "docs/recipes.md").read_text()
FILES = {
    code.split("\n")[0].split()[1]: code
    for language, code in fences(RECIPES)
    if re.match(r"# \w+\.py", code)
}


def test_the_recipe_of_several_rewards_is_their_weighted_sum(tmp_path):
    (tmp_path / "rewards.py").write_text(FILES["rewards.py"])
    f = runpy.run_path(str(tmp_path / "rewards.py"))
    responses = [" Happy to help.", " No." + " no" * 49, " Thank you.\n\nHuman: More?"]
    assert f["total"]([""] * 3, responses) == pytest.approx([2, -1, 0])


def test_the_recipe_of_talking_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "talk.py").write_text(FILES["talk.py"])
    lines = iter(["How can I save money?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(sys, "argv", ["talk.py", str(ROOT / "tiny/sft")])
    runpy.run_path(str(tmp_path / "talk.py"), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_the_recipe_of_ending_a_stopped_run_saves_its_model(tmp_path):
    """And what the run logs is explained in docs/metrics.md."""
    run("p3o_v2", *TINY, "--num-updates", 2, cwd=tmp_path)
    folder = tmp_path / "runs/p3o_v2/tiny/tiny"
    shutil.rmtree(
        folder / "model"
    )  # as if it had been stopped after its checkpoint, with more updates to go
    run("p3o_v2", *TINY, "--resume", "--num-updates", 2, cwd=tmp_path)
    assert (folder / "model").is_dir()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    explained = {key for row in table for key in re.findall(r"`([\w/]+)`", row)}
    for name in ("metrics.jsonl", "frontier.jsonl"):
        row = json.loads((folder / name).read_text().splitlines()[-1])
        assert {key.removesuffix("_se") for key in row} - explained == {"step"}


# --------------------------------------------------------------------------------------------------------- the memory
@pytest.mark.parametrize("script", [p3o_v1, p3o_v2], ids=["p3o_v1", "p3o_v2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("unfrozen", [0, 1])
def test_computed_bytes_of_what_is_trained_and_frozen_are_exact(script, dtype, unfrozen):
    folder = ROOT / "tiny/sft"
    args = SimpleNamespace(unfrozen_layers=unfrozen, dtype=dtype, gradient_checkpointing=False)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2)
    )
    script.set_up_model(policy, args, True), script.set_up_model(reference, args, False)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-4, fused=True)
    with torch.autocast("cpu", torch.bfloat16, dtype == "bfloat16"):
        policy(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    frozen = [weight for weight in policy.parameters() if not weight.requires_grad]
    shared = zip(reference.parameters(), policy.parameters())  # what is frozen, in the first plan
    own = [ref for ref, weight in shared if weight.requires_grad or script is p3o_v2]
    moments = [value for state in optimizer.state.values() for value in state.values()]
    parts = {
        "trained weights": trained,
        "gradients": [weight.grad for weight in trained],
        "AdamW": moments,
    }
    parts |= {"reference": own} | ({"frozen weights of the policy": frozen} if unfrozen else {})
    real = {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in parts.items()}
    options = {"script": script.__name__, "dtype": dtype, "unfrozen_layers": unfrozen}
    _, computed = memory.memory(memory.Args(**options), AutoConfig.from_pretrained(folder))
    assert {name: computed[name] for name in real} == real


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["gpt_neox", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_computed_activations_are_those_that_torch_keeps(shape, dtype, checkpointing):
    hidden, found = 256, []
    for layers in (1, 2):
        sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 2}
        sizes |= {
            "intermediate_size": int(hidden * (4 if shape == "gpt_neox" else 3.5)),
            "num_key_value_heads": 2,
            "head_dim": 128,
        }
        model = build(shape, "policy", 1, **sizes, max_position_embeddings=256)
        p3o_v2.set_up_model(
            model,
            SimpleNamespace(unfrozen_layers=0, dtype=dtype, gradient_checkpointing=checkpointing),
            True,
        )
        weights = {weight.numel() for weight in model.parameters() if weight.ndim == 2}
        owned = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        kept, alive = {}, []

        def keep(tensor, owned=owned, kept=kept, alive=alive, weights=weights):
            alive.append(tensor)  # so that no address is used twice
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned and not (
                tensor.ndim == 2 and tensor.numel() in weights
            ):
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        prompts, responses = [torch.arange(71)] * 2, [[torch.arange(32)] * 2] * 2
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, dtype == "bfloat16"):
            p3o_v2.response_hidden(model, prompts, responses)
        found.append(sum(kept.values()))
    expected = 4 if checkpointing else memory.KEPT[shape, 4 if dtype == "float32" else 2]
    assert (found[1] - found[0]) / (2 * (70 + 2 * 33) * hidden) == pytest.approx(expected, rel=0.05)


def test_the_table_of_memory_and_time_is_computed():
    rows, speed = 0, 0
    for line in RECIPES.splitlines():
        speed = (re.findall(r"at (\d+) TFLOP/s", line, re.I) or [speed])[0]
        match = re.fullmatch(
            r"\| `(.*?)(\w+)\.py (--model pythia.*)` \| (.*) \| (.*) \| (.*) \|", line
        )
        if not match:
            continue
        launcher, script, flags, *shown = match.groups()
        options = [
            "--script",
            script,
            "--tflops",
            speed,
            *re.sub(r" --dataset \w+", "", flags).split(),
        ]
        if processes := re.search(r"--num_processes (\d+)", launcher):
            options += ["--sharing", "ddp", "--processes", processes[1]]
        args = tyro.cli(memory.Args, args=options, config=(tyro.conf.FlagCreatePairsOff,))
        gib = [sum(parts.values()) / 2**30 for parts in memory.memory(args, config_of(args.model))]
        seconds = sum(memory.seconds(args, config_of(args.model))) if script in memory.ONLINE else 0
        assert shown == [f"{number:.1f}" if number else "–" for number in (*gib, seconds)], line
        assert max(gib) < (24 if int(speed) < 100 else 80), line
        rows += 1
    assert rows == len(re.findall(r"^\| `[^`]*\.py --model pythia", RECIPES, re.M)) > 0


def test_the_citation_is_of_this_version_and_license():
    text = (ROOT / "CITATION.cff").read_text()
    assert (
        "cff-version: 1.2.0" in text
        and "license: MIT" in text
        and "arxiv.org/abs/2310.00212" in text
    )
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
