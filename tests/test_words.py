"""One word has one meaning, the field's: docs/glossary.md. Old words define nothing new."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Words of version 0.1 for which the field has another, or that had several meanings.
OLD_WORDS = """
    told spell spelled whole opened further share shares exchanged summed spread parcel
    picture pictures clip clips taps tell say drawn placed waiting muted watch staged mix
    """
# Names from before this rule. One that is gone leaves the set, and none is added.
LEFT = """
    _clip _drawn _opened _placed _say _whole drawn opened share spread summed
    taps tell waiting whole
    """


def words_of(name: str) -> set[str]:
    """The words of an identifier, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def defined(path: Path) -> set[str]:
    """The functions, classes and parameters that a file defines."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.arg):
            names.add(node.arg)
    return names


def names_with_old_words() -> set[str]:
    """Of all definitions of the package."""
    names = set().union(*map(defined, (ROOT / "qwen3vl_jax").rglob("*.py")))
    return {name for name in names if words_of(name) & set(OLD_WORDS.split())}


def test_old_words_define_nothing_new():
    """What is not LEFT from before has the field's name."""
    assert names_with_old_words() <= set(LEFT.split())
