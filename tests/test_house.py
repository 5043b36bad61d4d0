"""The house rules: small scripts, one text for what scripts share, settings that are explained."""

import ast
import difflib
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from blocks import TRAINING, definitions, differences, spans

ROOT = Path(__file__).parent.parent
# Python tokens without comments, newlines and indentation: the budget of each script.
BUDGETS = {
    "sft.py": 4200,
    "reward_model.py": 4200,
    "p3o_v2.py": 6300,
    "p3o_v1.py": 6300,
    "rloo.py": 6300,
    "grpo.py": 6300,
    "online_dpo.py": 6300,
    "ppo.py": 7400,
    "dpo.py": 5600,
    "ipo.py": 5600,
    "mpo.py": 6200,
    "prepare_data.py": 4800,
    "evaluate.py": 9000,  # together with limit.py
    "limit.py": 9000,
    "plot_frontier.py": 2800,
}
NOT_COUNTED = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
each_script = pytest.mark.parametrize("name", BUDGETS)


def count(text):
    """(tokens, code lines) of a source text."""
    tokens, depth = [], 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if depth == 0 and token.type not in NOT_COUNTED:
            tokens.append(token)
        # An f-string is one token, as before Python 3.12
        name = tokenize.tok_name[token.type]
        depth += (name == "FSTRING_START") - (name == "FSTRING_END")
    return len(tokens), len({token.start[0] for token in tokens})


def count_all(names):
    return sum(count((ROOT / name).read_text())[0] for name in names)


def fields(name):
    """(field, type, default, help comment) of a script's Args, None for what its line lacks."""
    pattern = r"(?P<name>\w+): (?P<type>.+?)(?: = (?P<default>.+?))?(?:  # (?P<help>\S.*))?"
    text = definitions(ROOT / name)["Args"]
    for node in ast.parse(text).body[0].body:
        if isinstance(node, ast.AnnAssign):
            line = text.splitlines()[node.lineno - 1].strip()
            match = re.fullmatch(pattern, line)
            yield match.groups() if match else (node.target.id, None, None, None)


@each_script
def test_a_script_is_small_and_so_are_its_lines_and_functions(name):
    text = (ROOT / name).read_text()
    tokens, lines = count(text)
    assert tokens <= BUDGETS[name]
    assert tokens / lines <= 11.5, "one thought a line"
    assert [line for line in text.splitlines() if len(line) > 100] == []
    for function, (first, last) in spans(ROOT / name).items():
        assert last - first <= (200 if function == "main" else 60), function


def test_scripts_together_are_within_their_budget():
    assert count_all(TRAINING) < 65_000 and count_all(["evaluate.py", "limit.py"]) <= 9000


@each_script
def test_every_function_but_main_has_a_docstring(name):
    for node in ast.parse((ROOT / name).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name != "main":
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("name", TRAINING)
def test_the_objective_and_the_loss_are_on_the_first_page(name):
    """Module docstring and loss, in the first 120 lines."""
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
    assert differences([ROOT / name for name in BUDGETS]) == []


def test_settings_of_the_same_name_have_the_same_type_and_help():
    seen = {}
    for name in TRAINING:
        for field, kind, _, help_comment in fields(name):
            seen.setdefault(field, set()).add((kind, help_comment))
    assert [found for found in seen.values() if len(found) > 1] == []


@each_script
def test_every_setting_has_a_default_and_a_help_comment_and_is_read(name):
    read = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if isinstance(node.value, ast.Name) and node.value.id == "args":
                read.add(node.attr)
    for field, _, default, help_comment in fields(name):
        assert help_comment and field in read, field
        assert default is not None or name not in TRAINING, field


def test_importing_the_scripts_does_nothing(tmp_path):
    names = ", ".join(Path(name).stem for name in BUDGETS)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {names}"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
