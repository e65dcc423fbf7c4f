"""Method files are near-copies on purpose. This keeps them together: a `main` differs from dpo.py's
only where its method does, and every file has the same parts.
"""

import ast
import difflib
import re
from importlib import import_module

import pytest
from test_shape import METHODS, OFFLINE, sources

ALLOWED = {  # lines of `main` that differ from dpo.py's, counted in both files
    "ipo": 8, "cpo": 10, "orpo": 8, "simpo": 10, "slic": 18, "listwise_dpo": 13, "pro": 16,
    "rrhf": 15, "sft": 14, "kto": 55, "reward_model": 55,
}  # fmt: skip


def tree(method: str) -> ast.Module:
    return ast.parse(sources()[f"{method}.py"])


def main_of(method: str) -> list[str]:
    """The lines of `main` without comments and line wraps, with one name for all losses."""
    (main,) = [n for n in tree(method).body if getattr(n, "name", "") == "main"]
    return ast.unparse(main).replace(f"{method}_loss", "method_loss").splitlines()


def differences(method: str) -> list[str]:
    diff = difflib.ndiff(main_of("dpo"), main_of(method))
    return [line for line in diff if line[:1] in "-+"]


@pytest.mark.parametrize("method", ALLOWED)
def test_main_differs_only_where_the_method_does(method):
    found = differences(method)
    assert 0 < len(found) <= ALLOWED[method], "\n".join(found)


def test_all_offline_methods_are_compared():
    assert ALLOWED.keys() == set(OFFLINE) - {"dpo"}


@pytest.mark.parametrize("method", METHODS)
def test_a_file_has_the_parts_of_a_method(method):
    """Importing one trains nothing; the last line parses the flags and calls main."""
    body = tree(method).body
    names = [getattr(node, "name", "") for node in body]
    assert {"Args", "main"} <= set(names) and any(name.endswith("_loss") for name in names)
    *parts, last = body
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Expr)
    assert all(isinstance(node, kinds) for node in parts)
    assert ast.unparse(last) == (
        "if __name__ == '__main__':\n    main(common.parse(Args, PRESETS, __doc__))"
    )
    assert issubclass(import_module(method).Args, import_module("common").Args)


@pytest.mark.parametrize("method", ["common", *METHODS])
def test_every_argument_is_used_and_has_a_comment(method):
    """A field is one line with its comment: --help shows the comment only from there."""
    (args,) = [n for n in tree(method).body if getattr(n, "name", "") == "Args"]
    lines, code = sources()[f"{method}.py"].splitlines(), "".join(sources().values())
    for node in args.body:
        if isinstance(node, ast.AnnAssign):
            assert re.search(r"\S  # \S", lines[node.end_lineno - 1]), node.target.id
            assert node.lineno == node.end_lineno, node.target.id
            assert re.search(rf"args\.{node.target.id}\b|\"{node.target.id}\"", code)
