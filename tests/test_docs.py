"""What README.md and docs/ say: flags, keys and files exist, links lead somewhere, recipes run."""

import ast
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from blocks import TRAINING
from conftest import run
from test_house import count

ROOT = Path(__file__).parent.parent
DOCS = {path.name: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
DOCS["study"] = ROOT / "study/README.md"
TEXT = {name: path.read_text() for name, path in DOCS.items()}
# results.md has the commands of its measurements, some of them of earlier versions.
PRESENT = [name for name in DOCS if name != "results.md"]
TINY = "--num-updates 1 --prompts-per-update 4 --minibatch-size 4 --num-epochs 1 --eval-prompts 4"
TINY = [*TINY.split(), "--max-response-tokens", "8"]
KEY = r"(?:objective|policy|value|val|rewards|time|sft|rm)/\w+"


def flags_of(script):
    """The flags of a script: the fields of its dataclasses, or what it gives to argparse."""
    text = script.read_text()
    flags = set(re.findall(r'"(--[a-z-]+)"', text))
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.decorator_list:
            fields = [part.target.id for part in node.body if isinstance(part, ast.AnnAssign)]
            flags |= {f"--{field.replace('_', '-')}" for field in fields}
    return flags | {"--help"}


SCRIPTS = [
    path for folder in ("", "benchmark/", "study/", "t*/") for path in ROOT.glob(f"{folder}*.py")
]
FLAGS = {str(path.relative_to(ROOT)): flags_of(path) for path in SCRIPTS}
ANY = set().union(*FLAGS.values(), {"--lora-rank", "--requeue"})  # of a patch, and Slurm's
FENCES = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def commands(text):
    """Lines of fenced blocks without a language, and code in sentences."""
    for language, code in FENCES.findall(text):
        if not language:
            yield from code.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`]+)`", FENCES.sub("", text))


@pytest.mark.parametrize("doc", PRESENT)
def test_every_script_exists_and_has_the_flags_that_it_is_given(doc):
    for command in commands(TEXT[doc]):
        words = re.sub(r"\s#\s.*", "", command).split()
        at = next((i for i, word in enumerate(words) if re.fullmatch(r"[\w/.]+\.py", word)), 0)
        script = words[at] if words else ""
        if words[:1] == ["python"]:
            assert script in {*FLAGS, "X.py", "talk.py"}
        flags = {word for word in words[at:] if re.fullmatch(r"--[a-z][\w-]*", word)}
        assert flags <= FLAGS.get(script, ANY), command


def slugs(path):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCES.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("doc", DOCS)
def test_every_link_within_the_repository_leads_somewhere(doc):
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", TEXT[doc]):
        path, _, anchor = link.partition("#")
        target = DOCS[doc].parent / path if path else DOCS[doc]
        assert target.exists() and (not anchor or anchor in slugs(target)), link


def test_pages_are_short_and_of_today():
    assert not any(re.search("first form|old form|second plan", TEXT[name]) for name in PRESENT)
    lines = TEXT["README.md"].splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 100
    assert len(TEXT["algorithms.md"].splitlines()) <= 250


def test_the_readme_has_every_training_script_and_its_tokens():
    row = r"^\| `(\w+\.py)` \| .* \| ([\d,]+) \| [^|]* \| \d+ \|$"
    rows = re.findall(row, TEXT["README.md"], re.M)
    assert {name: int(tokens.replace(",", "")) for name, tokens in rows} == {
        name: count((ROOT / name).read_text())[0] for name in TRAINING
    }


def test_algorithms_and_results_have_the_figures_of_the_readme():
    cell = r"\d\.\d\d / \d\.\d\d / \d\.\d"
    readme = re.findall(rf"^\| `(\w+)\.py` .* ({cell}) \|", TEXT["README.md"], re.M)
    assert len(readme) == 9
    for name, figures in readme:
        reward, gold, kl = figures.split(" / ")
        assert figures in TEXT["algorithms.md"]
        row = rf"^\| `{name}.py` \| {reward} ± .{{4}} \| {gold} ± .{{4}} \| {kl} ± "
        assert re.search(row, TEXT["results.md"], re.M), name


def test_the_readme_quotes_the_example():
    [quote] = re.findall(r"^```diff\n(.*?)^```", TEXT["README.md"], re.M | re.S)
    diff = (ROOT / "docs/examples/rebel.diff").read_text().splitlines()
    assert [line for line in quote.splitlines() if line not in diff] == []


def test_metrics_explains_the_keys_that_are_logged_and_no_others():
    text = "".join((ROOT / name).read_text() for name in TRAINING)
    logged = set(re.findall(rf'"({KEY})"|(?:metrics|values)\["(\w+)"\]', text))
    logged = {key or other for key, other in logged} | {"kl", "gold", "rm/eval_accuracy_decile_0"}
    rows = re.findall(r"^\| (`[^|]*) \|", TEXT["metrics.md"], re.M)
    named = {key for row in rows for key in re.findall(r"`([\w/]+)`", row)} - {"_9"}
    assert named == logged
    for name in ("README.md", "recipes.md", "algorithms.md"):  # from-trl.md has TRL's keys, too
        assert set(re.findall(rf"`({KEY})`", TEXT[name])) <= named


def test_a_script_alone_works_elsewhere(tmp_path):
    script = shutil.copy(ROOT / "p3o_v2.py", tmp_path / "p3o_v2.py")
    shutil.copytree(ROOT / "tiny/sft", tmp_path / "policy")
    rows = [json.dumps({"prompt": f"Say {n}:"}) + "\n" for n in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(rows))
    (tmp_path / "reward.py").write_text("def f(x, y):\n    return [len(text) for text in y]\n")
    own = ["--model", "policy", "--dataset", "data.jsonl", "--reward-fn", "reward.py:f"]
    run(script, *TINY, *own, cwd=tmp_path)
    assert (tmp_path / "runs/p3o_v2/data.jsonl/policy/model").is_dir()


def recipe(name, folder):
    """The file `name` of docs/recipes.md, written to a folder."""
    blocks = FENCES.findall(TEXT["recipes.md"])
    [code] = [code for _, code in blocks if code.startswith(f"# {name}")]
    (folder / name).write_text(code)
    return str(folder / name)


def test_the_recipe_of_several_rewards_is_their_weighted_sum(tmp_path):
    total = runpy.run_path(recipe("rewards.py", tmp_path))["total"]
    responses = [" Happy to help.", " No." + " no" * 49, " Thank you.\n\nHuman: More?"]
    assert total([""] * 3, responses) == pytest.approx([2, -1, 0])


def test_the_recipe_of_talking_runs(tmp_path, monkeypatch, capsys):
    lines = iter(["How can I save money?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(sys, "argv", ["talk.py", str(ROOT / "tiny/sft")])
    runpy.run_path(recipe("talk.py", tmp_path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_the_recipe_of_ending_a_stopped_run_saves_its_model(tmp_path):
    run("p3o_v2", *TINY, "--num-updates", 2, cwd=tmp_path)
    folder = tmp_path / "runs/p3o_v2/tiny/tiny"
    shutil.rmtree(folder / "model")  # as if it had been stopped after its checkpoint
    run("p3o_v2", *TINY, "--resume", "--num-updates", 2, cwd=tmp_path)
    assert (folder / "model").is_dir()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
