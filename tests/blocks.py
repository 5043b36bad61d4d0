"""Blocks are the functions and classes that scripts share: one name, one text.

python tests/blocks.py                   say where blocks of one name differ
python tests/blocks.py --fix p3o_v2.py   copy the blocks of p3o_v2.py into all that have them
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAINING = "sft reward_model p3o_v2 p3o_v1 rloo grpo ppo online_dpo dpo ipo mpo".split()
TRAINING = tuple(f"{name}.py" for name in TRAINING)
SCRIPTS = (*TRAINING, "prepare_data.py", "evaluate.py", "limit.py", "plot_frontier.py")


def is_block(name):
    """Whether a function or class must be the same in every script that has it."""
    return name not in ("Args", "main", "gae") and not name.endswith("_loss")


def spans(path):
    """{name: (first, last)}: line numbers, from 0, of the top-level functions and classes."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            decorators = [decorator.lineno for decorator in node.decorator_list]
            found[node.name] = (min([node.lineno, *decorators]) - 1, node.end_lineno)
    return found


def definitions(path):
    """{name: text} of the top-level functions and classes of a script."""
    lines = path.read_text().splitlines()
    return {name: "\n".join(lines[a:b]) for name, (a, b) in spans(path).items()}


def differences(paths):
    """Sentences that say which blocks differ, and where."""
    texts = {}
    for path in paths:
        for name, text in definitions(path).items():
            if is_block(name):
                texts.setdefault(name, {}).setdefault(text, []).append(path.name)
    return [
        f"{name}: " + " | ".join(", ".join(scripts) for scripts in versions.values())
        for name, versions in texts.items()
        if len(versions) > 1
    ]


def fix(source, paths):
    """Copy the blocks of the script `source` into the others that have them."""
    blocks = definitions(source)
    for path in paths:
        lines = path.read_text().splitlines()
        for name, (first, last) in sorted(spans(path).items(), key=lambda item: -item[1][0]):
            if is_block(name) and name in blocks:
                lines[first:last] = blocks[name].splitlines()
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fix", metavar="SCRIPT", help="copy the blocks of SCRIPT into the others")
    all_paths = [ROOT / name for name in SCRIPTS]
    if script := parser.parse_args().fix:
        fix(ROOT / Path(script).name, all_paths)
    found = differences(all_paths)
    print("\n".join(found) or "blocks of one name are equal")
    sys.exit(bool(found))
