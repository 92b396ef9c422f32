"""Arrows point one way: cli -> bench, prompts, export -> engine, matching -> the vocabulary (docs/design)."""

import ast
import sys
from pathlib import Path

import pytest

import difftap

ROOT = Path(difftap.__file__).parent
VOCABULARY = {
    "taps",
    "recipe",
    "coords",
    "images",
    "points",
    "outputs",
    "manifest",
    "errors",
    "digests",
    "features",
    "model",
}
VOCABULARY |= {"machine"}
COMPOSED = {
    "pipeline",
    "making",
    "extraction",
    "featuresource",
    "conditioning",
    "engines",
    "pairs",
    "maps",
    "journal",
    "draw",
    "results",
    "prototypes",
    "auto",
    "doctor",
    "index",
}
ROOMS = {
    "export",
    "engine",
    "matching",
    "bench",
    "prompts",
    "commands",
    "cli",
    "distances",
    "sources",
    "store",
    "tuning",
    *COMPOSED,
}
FORBIDDEN = {
    "engine": ROOMS - {"engine"},
    "matching": ROOMS - {"matching"},
    "distances": ROOMS - {"distances"},
    "sources": ROOMS - {"sources"},
    "store": {"sources", "bench", "commands", "cli", "export", "matching", "prompts", "distances", *COMPOSED},
    "prompts": {"bench", "commands", "cli", "export", "matching", "tuning", *COMPOSED},
    "export": {"bench", "commands", "cli", "matching", "prompts", "tuning", *COMPOSED},
    **{part: {"bench", "commands", "cli", "tuning"} for part in sorted(COMPOSED)},
    "bench": {"commands", "cli", "tuning"},
    "tuning": {"commands", "cli"},
    **dict.fromkeys(VOCABULARY, ROOMS),
}


def test_every_module_has_its_place():
    known = VOCABULARY | ROOMS | {"__init__", "assets", "presets", "py"}
    assert {path.name.split(".")[0] for path in ROOT.iterdir() if not path.name.startswith("__pycache__")} <= known


def _imports(path: Path, *, top: bool = False) -> set[str]:
    """Names of the modules that a file imports, anywhere or at module level only; not under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(nodes) -> None:
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            elif not (top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
                visit(ast.iter_child_nodes(node))

    visit(tree.body)
    return found


def _files(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py")) if (ROOT / part).is_dir() else [ROOT / f"{part}.py"]


@pytest.mark.parametrize("part", FORBIDDEN)
def test_no_arrow_points_back(part):
    assert _files(part)
    for path in _files(part):
        rooms = {name.split(".")[1] for name in _imports(path) if name.startswith("difftap.")}
        assert not rooms & FORBIDDEN[part], f"{path.relative_to(ROOT)} imports {sorted(rooms & FORBIDDEN[part])}"


def test_matching_needs_numpy_and_the_vocabulary_alone():
    for path in _files("matching"):
        outside = {name.split(".")[0] for name in _imports(path)} - set(sys.stdlib_module_names)
        assert outside <= {"numpy", "difftap"}, path


def test_heavy_packages_are_imported_inside_the_function_that_needs_them():
    heavy = {
        "torch",
        "diffusers",
        "transformers",
        "onnx",
        "onnxscript",
        "onnx_ir",
        "openvino",
        "nncf",
        "tensorrt",
        "tensorrt_rtx",
        "faiss",
        "pymilvus",
        "milvus_lite",
        "huggingface_hub",
        "onnxruntime",
        "pyarrow",
        "pycocotools",
        "matplotlib",
        "zarr",
        "fsspec",
        "ray",
    }
    allowed = {
        "engine/torch_model.py",
        "engine/torch_prompts.py",
        "tuning/loss.py",
    }  # torch modules themselves; imported by the torch backend and the export step alone
    for path in sorted(ROOT.rglob("*.py")):
        found = {name.split(".")[0] for name in _imports(path, top=True)} & heavy
        assert not found or path.relative_to(ROOT).as_posix() in allowed, f"{path}: {found}"


def test_only_the_command_line_prints():
    for path in sorted(ROOT.rglob("*.py")):
        if path.relative_to(ROOT).parts[0] in ("commands", "cli.py"):
            continue
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        names = {f.id for f in calls if isinstance(f, ast.Name)} | {
            ast.unparse(f) for f in calls if isinstance(f, ast.Attribute)
        }
        assert not names & {"print", "exit", "sys.exit", "click.echo"}, path
