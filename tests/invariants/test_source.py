"""What the package's source may not contain, read from its syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hf_compress"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in FILES}

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BROAD = {"Exception", "BaseException"}
OWN_PREFIXES = ("hf_compress", ".")


def dotted(node: ast.expr) -> str:
    """`torch.load` for the expression; empty for what is no plain chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Every syntax node with its place."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            yield f"{name}:{getattr(node, 'lineno', 0)}", node


def test_there_is_something_to_read() -> None:
    assert len(TREES) > 40
    assert "checkpoint/save.py" in TREES


def test_no_pickle() -> None:
    found = []
    for place, node in nodes():
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        found += [f"{place} imports {name}" for name in names if name.partition(".")[0] in PICKLES]
    assert found == []


@pytest.mark.parametrize("banned", ["torch.load", "torch.save", "numpy.load", "np.load", "eval", "exec", "os.system"])
def test_banned_calls(banned: str) -> None:
    calls = [place for place, node in nodes() if isinstance(node, ast.Call) and dotted(node.func) == banned]
    assert calls == []


def test_trust_remote_code_is_never_set() -> None:
    found = [
        place
        for place, node in nodes()
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
        if not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]
    assert found == []


def test_no_broad_except_and_no_silent_one() -> None:
    found = []
    for place, node in nodes():
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        last = node.body[-1]
        cleans_up = isinstance(last, ast.Raise) and last.exc is None  # and raises the same error again
        if not cleans_up and any(kind is None or dotted(kind) in BROAD for kind in kinds):
            found.append(f"{place} catches everything")
        if all(isinstance(line, ast.Pass) for line in node.body):
            found.append(f"{place} passes")
    assert found == []


def test_suppress_names_what_it_expects() -> None:
    found = [
        place
        for place, node in nodes()
        if isinstance(node, ast.Call) and dotted(node.func) in ("suppress", "contextlib.suppress")
        if not node.args or any(dotted(kind) in BROAD for kind in node.args)
    ]
    assert found == []


def test_no_assert() -> None:
    assert [place for place, node in nodes() if isinstance(node, ast.Assert)] == []


def _imported(tree: ast.AST) -> set[str]:
    """Names that a file binds by importing from other packages."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.asname or alias.name.partition(".")[0], alias.name) for alias in node.names]
            names |= {bound for bound, source in found if not source.startswith("hf_compress")}
        elif (
            isinstance(node, ast.ImportFrom) and node.level == 0 and not (node.module or "").startswith("hf_compress")
        ):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_no_monkeypatching() -> None:
    """No attribute of an imported module, class or function is ever assigned, deleted or set by name.

    `sys.stdout`, `sys.meta_path` and `os.environ` of the clean process are its own.
    """
    found = []
    for name, tree in TREES.items():
        imported, own = _imported(tree), name == "checkpoint/proof_worker.py"
        for node in ast.walk(tree):
            targets: list[ast.expr] = []
            if isinstance(node, ast.Assign | ast.Delete):
                targets = node.targets
            elif isinstance(node, ast.AugAssign | ast.AnnAssign):
                targets = [node.target]
            elif isinstance(node, ast.Call) and dotted(node.func) in ("setattr", "delattr") and node.args:
                targets = [ast.Attribute(node.args[0], "?", ast.Store())]
            for target in targets:
                base = target.value if isinstance(target, ast.Subscript) else target
                chain = dotted(base)
                if isinstance(base, ast.Attribute) and chain.partition(".")[0] in imported:
                    found += (
                        []
                        if own and chain in ("sys.stdout", "sys.meta_path", "os.environ")
                        else [f"{name}:{node.lineno} {chain}"]
                    )
    assert found == []


def test_environment_is_no_switch() -> None:
    """Only the clean process and what starts it may read or write environment variables."""
    allowed = {"checkpoint/worker.py", "checkpoint/proof_worker.py"}
    found = {
        place.partition(":")[0]
        for place, node in nodes()
        if isinstance(node, ast.Attribute) and dotted(node) in ("os.environ", "os.getenv")
    }
    assert found - allowed - {"evaluation/environment.py", "cli/doctor.py"} == set()


def test_the_clean_process_imports_nothing_of_ours() -> None:
    tree = TREES["checkpoint/proof_worker.py"]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert not (node.module or "").startswith("hf_compress")
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("hf_compress") for alias in node.names)


def test_global_random_state_is_never_seeded() -> None:
    seeds = {"torch.manual_seed", "torch.seed", "random.seed", "np.random.seed", "numpy.random.seed", "set_seed"}
    seeds |= {"torch.random.manual_seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all"}
    calls = [place for place, node in nodes() if isinstance(node, ast.Call) and dotted(node.func) in seeds]
    assert calls == []
