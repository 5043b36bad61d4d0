"""The house rules: small scripts, one text for what scripts share, settings that are explained."""

import ast
import difflib
import io
import re
import subprocess
import sys
import tokenize

import pytest
from blocks import ROOT, SCRIPTS, TRAINING, definitions, differences, spans

# The budget of each script: Python tokens without comments, newlines and indentation.
BUDGETS = {
    4200: "sft.py reward_model.py",
    6300: "p3o_v2.py p3o_v1.py rloo.py grpo.py online_dpo.py",
    7400: "ppo.py",
    5600: "dpo.py ipo.py",
    6200: "mpo.py",
    4800: "prepare_data.py",
    9000: "evaluate.py limit.py",  # these two together
    2800: "plot_frontier.py",
}
BUDGETS = {name: budget for budget, names in BUDGETS.items() for name in names.split()}
NOT_COUNTED = "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER".split()
each_script = pytest.mark.parametrize("name", SCRIPTS)


def count(text):
    """(tokens, code lines) of a source text."""
    tokens, depth = [], 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if depth == 0 and name not in NOT_COUNTED:
            tokens.append(token)
        # An f-string is one token, as before Python 3.12
        depth += (name == "FSTRING_START") - (name == "FSTRING_END")
    return len(tokens), len({token.start[0] for token in tokens})


def fields(name):
    """(field, type, default, help comment) of a script's Args, None for what its line lacks."""
    pattern = r"    (\w+): (.+?)(?: = (.+?))?(?:  # (\S.*))?"
    lines = definitions(ROOT / name)["Args"].splitlines()
    return [re.fullmatch(pattern, line).groups() for line in lines if re.match(r" {4}\w", line)]


@each_script
def test_a_script_and_its_functions_are_small_and_explained(name):
    text = (ROOT / name).read_text()
    tokens, lines = count(text)
    assert tokens <= BUDGETS[name]
    assert tokens / lines <= 11.5, "one thought a line"
    for function, (first, last) in spans(ROOT / name).items():
        assert last - first <= (200 if function == "main" else 60), function
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name != "main":
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("names, budget", [(TRAINING, 65_000), (("evaluate.py", "limit.py"), 9000)])
def test_scripts_together_are_within_their_budget(names, budget):
    assert sum(count((ROOT / name).read_text())[0] for name in names) <= budget


@pytest.mark.parametrize("name", TRAINING)
def test_the_objective_and_the_loss_are_on_the_first_page(name):
    assert ast.get_docstring(ast.parse((ROOT / name).read_text()))
    losses = [span for function, span in spans(ROOT / name).items() if function.endswith("_loss")]
    assert losses and all(last <= 120 for _, last in losses)


@pytest.mark.parametrize("pair", [("p3o_v1.py", "p3o_v2.py"), ("p3o_v2.py", "rloo.py")])
def test_scripts_differ_in_the_algorithm_alone(pair):
    """Lines that diff would mark with < or >."""
    old, new = [(ROOT / name).read_text().splitlines() for name in pair]
    changed = list(difflib.unified_diff(old, new, n=0, lineterm=""))[2:]
    assert sum(line[0] in "+-" for line in changed) <= 60


def test_blocks_of_one_name_have_one_text():
    assert differences([ROOT / name for name in SCRIPTS]) == []


def test_settings_of_the_same_name_have_the_same_type_and_help():
    seen = {}
    for name in TRAINING:
        for field, kind, _, help_comment in fields(name):
            seen.setdefault(field, set()).add((kind, help_comment))
    assert [found for found in seen.values() if len(found) > 1] == []


@each_script
def test_every_setting_has_a_default_and_a_help_comment_and_is_read(name):
    read = re.findall(r"\bargs\.(\w+)\b(?! = )", (ROOT / name).read_text())
    for field, _, default, help_comment in fields(name):
        assert help_comment and field in read, field
        assert default is not None or name not in TRAINING, field


def test_importing_the_scripts_does_nothing(tmp_path):
    names = ", ".join(name.removesuffix(".py") for name in SCRIPTS)
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {names}",
    ]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
