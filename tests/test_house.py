"""The house: what may use what, and how long things may be (vae_ood/README.md)."""

import ast

import pytest

from tests.conftest import ROOT

ORDER = ("kernels", "cli", "parallel", "data", "metrics", "model", "checkpoint", "likelihood", "step", "training",
         "features", "densities", "patches", "pca", "maps", "scores", "member", "detector", "heat", "plots",
         "scoring", "evaluation", "reproduce", "promise", "pictures", "detection", "sets", "bench", "bench_pythae")
LABORATORY = ORDER[ORDER.index("reproduce"):]
FILES = [path for folder in ("vae_ood", "kernels", "theory") for path in (ROOT / folder).rglob("*.py")]
FILES += [ROOT / "run.py", ROOT / "eval.py"]


def imported(path):
    """[(dotted module, name)] of what a file imports, anywhere in it; the name is None of `import module`. A relative
    module begins with its dots."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def part_of(module, name=None):
    """The part of vae_ood that an import takes from, or None."""
    first, *rest = module.split(".")
    if first != "vae_ood":
        return None
    return rest[0] if rest else name if name in ORDER else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    place = path.relative_to(ROOT).with_suffix("").parts
    found = list(imported(path))
    used = {part_of(*one) for one in found} - {None}
    modules = {module.split(".")[0] for module, _ in found}
    assert not modules & {"run", "eval"} and (place[0] == "kernels" or "" not in modules)
    if place[0] == "kernels":
        outside = [one for one in found if one[0].startswith(("..", "vae_ood", "theory"))]
        assert all(part_of(*one) == "kernels" and place[1] == "bench_kernels" for one in outside), outside
    elif place[0] == "vae_ood" and place[1] != "__init__":
        assert place[1] in ORDER and all(ORDER.index(one) <= ORDER.index(place[1]) for one in used), used
        assert "theory" not in modules
    else:
        assert not used & set(LABORATORY)


def test_the_kernels_have_one_name():
    """vae_ood.kernels: were they imported as `kernels` too, each operation would be registered twice."""
    for path in [*FILES, *(ROOT / "tests").rglob("*.py")]:
        assert not [module for module, _ in imported(path) if module.split(".")[0] == "kernels"], path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short_and_private_names_private(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    assert not [node.name for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60]
    assert not [name for _, name in imported(path) if name and name.startswith("_")]
