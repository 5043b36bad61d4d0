"""The house rules: what has the same name in two scripts is the same, and every setting is explained and used."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINES = {  # as they are, and the aim, which none meets yet: the first number may only be lowered
    "p3o_v2.py": (1019, 600),
    "p3o_v1.py": (1020, 600),
    "ppo.py": (1102, 650),
    "online_dpo.py": (995, 600),
    "sft.py": (845, 500),
    "reward_model.py": (795, 500),
    "dpo.py": (1041, 500),
    "ipo.py": (1049, 500),
    "mpo.py": (1068, 500),
    "evaluate.py": (1161, 600),
}
SCRIPTS = [
    ROOT / name for name in sorted(LINES)
]  # not all that lies here: a user's own copy is no business of ours
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


def definitions(script):
    """{name: text} of the functions and classes at the top level of a script, decorators included."""
    text = script.read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def fields(script):
    """(name, type, default, help comment) of every field of a script's dataclasses, None for what a line lacks."""
    pattern = re.compile(
        r"(?P<name>\w+): (?P<type>.+?)(?: = (?P<default>.+?))?(?:  # (?P<help>\S.*))?"
    )
    for text in definitions(script).values():
        for node in ast.parse(text).body[0].body if text.startswith("@dataclass") else ():
            if isinstance(node, ast.AnnAssign):
                line = "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno]).strip()
                match = pattern.fullmatch(line)
                yield (
                    match.groups()
                    if match
                    else (node.target.id, ast.unparse(node.annotation), None, None)
                )


def is_shared(name):
    return name not in ("Args", "main", "gae") and not name.endswith("_loss")


@pytest.mark.parametrize(
    "name", sorted({name for path in SCRIPTS for name in definitions(path) if is_shared(name)})
)
def test_what_has_the_same_name_is_the_same(name):
    texts = {path.name: definitions(path)[name] for path in SCRIPTS if name in definitions(path)}
    first = next(iter(texts))
    assert [script for script in texts if texts[script] != texts[first]] == [], (
        f"other than in {first}"
    )


def test_settings_of_the_same_name_have_the_same_type_and_help():
    seen, differing = {}, []
    for path in SCRIPTS:
        for name, kind, _, help_comment in fields(path):
            first, *expected = seen.setdefault(name, (path.name, kind, help_comment))
            if [kind, help_comment] != expected:
                differing.append(f"{name}: {first} {expected}, {path.name} {[kind, help_comment]}")
    assert not differing, "\n".join(differing)


@each_script
def test_every_setting_has_a_default_and_a_help_comment_on_its_line(script):
    assert [
        name
        for name, _, default, help_comment in fields(script)
        if default is None or help_comment is None
    ] == []


@each_script
def test_every_setting_is_read(script):
    read = {
        node.attr
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        if isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    assert [name for name, *_ in fields(script) if name not in read] == []


def test_importing_the_scripts_does_nothing(tmp_path):
    names = ", ".join(path.stem for path in SCRIPTS)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {names}"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_heart_of_p3o_is_on_the_first_page():
    """Module docstring and loss, in the first 120 lines."""
    module = ast.parse((ROOT / "p3o_v2.py").read_text())
    assert ast.get_docstring(module)
    (loss,) = (
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef) and node.name == "pairwise_loss"
    )
    assert loss.end_lineno <= 120


@pytest.mark.parametrize("name", LINES)
def test_a_script_does_not_grow(name):
    """This does not hold the aims, which stand beside the numbers: it keeps scripts from going further away."""
    now, aim = LINES[name]
    assert len((ROOT / name).read_text().splitlines()) <= max(now, aim)
