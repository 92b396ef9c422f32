"""The rooms of the package stand in one order: a file imports from its own room and from the rooms above it."""

import ast
import sys
from pathlib import Path

import pytest

import difftap

ROOT = Path(difftap.__file__).parent
ORDER = (
    *("version", "errors", "machine", "coords", "images", "taps", "tensorspec", "recipe", "points", "featuremap"),
    *("artifacts", "datasets", "backbones", "matching", "engine", "export", "prompts", "pipeline", "features"),
    *("pages", "prototypes", "retrieval", "bench", "study", "tuning", "doctor", "commands", "cli"),
)
"""Packages and modules of `difftap`, those that know nothing of the others first (docs/design.md)."""

ONE_FILE_A_KIND = ("commands", "backends", "backbones", "datasets")
"""Folders whose files are named after their kind, such as `bench/pck.py` and `commands/bench/pck.py`."""


def test_every_module_has_its_place_in_the_order():
    here = {path.name.removesuffix(".py") for path in ROOT.glob("*") if path.suffix == ".py" or path.is_dir()}
    assert here - {"__init__", "__pycache__", "assets"} == set(ORDER)


def _imports(path: Path, *, top: bool = False) -> set[str]:
    """Names of the modules that a file imports: anywhere, or when it is loaded (not for annotations alone)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(nodes) -> None:
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
            elif top and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            elif not (top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
                visit(ast.iter_child_nodes(node))

    visit(tree.body)
    return found


def _module(path: Path) -> str:
    return ".".join(("difftap", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def _arrows() -> dict[str, set[str]]:
    """Which modules of the package each imports; a package is not counted where one of its modules is named."""
    modules = {_module(path): path for path in sorted(ROOT.rglob("*.py"))}
    found = {name: _imports(path) & modules.keys() for name, path in modules.items()}
    # A package's own __init__ may name the package; no other file imports itself.
    own = [name for name, arrows in found.items() if name in arrows and modules[name].name != "__init__.py"]
    assert not own, f"import themselves: {own}"
    return {name: arrows - {name} for name, arrows in found.items()}


ARROWS = _arrows()


@pytest.mark.parametrize(
    "room",
    ORDER,
)
def test_no_import_points_to_a_later_room(room):
    later = set(ORDER[ORDER.index(room) + 1 :])
    mine = {name: found for name, found in ARROWS.items() if name.split(".")[1:2] == [room]}
    assert mine
    back = sorted(f"{a} -> {b}" for a, found in mine.items() for b in found if set(b.split(".")[1:2]) & later)
    assert not back


def test_the_package_itself_imports_only_its_version():
    assert ARROWS["difftap"] <= {"difftap.version"}


def test_no_modules_import_one_another_in_a_circle():
    """Within a room too. A package's own names (its __init__) are taken from outside the room, or not at all."""
    state: dict[str, int] = {}

    def visit(name: str, way: tuple[str, ...]) -> None:
        if state.get(name) == 1:
            raise AssertionError("circle: " + " -> ".join((*way[way.index(name) :], name)))
        if name not in state:
            state[name] = 1
            for other in sorted(ARROWS[name] - {"difftap"}):
                visit(other, (*way, name))
            state[name] = 2

    for name in ARROWS:
        visit(name, ())


def test_a_file_name_means_one_thing():
    seen: dict[str, str] = {}
    for path in sorted(ROOT.rglob("*.py")):
        where = path.relative_to(ROOT)
        if path.name == "__init__.py" or set(where.parts[:-1]) & set(ONE_FILE_A_KIND):
            continue
        assert path.name not in seen, f"{where} and {seen[path.name]}"
        seen[path.name] = str(where)


def test_a_public_class_name_means_one_thing():
    seen: dict[str, str] = {}
    for name in ARROWS:
        path = ROOT.joinpath(*name.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert node.name not in seen, f"{node.name}: {name} and {seen[node.name]}"
                seen[node.name] = name


TESTS = Path(__file__).parent
OF_MANY_MODULES = {
    *("test_exported", "test_layers", "test_resume", "test_torch_free", "golden/test_cache_identities"),
    *("engine/test_contract", "export/test_sdxl", "matching/test_laws"),
}
"""Tests of what no single module keeps: the order of the rooms, one contract of all backends, SDXL."""


def test_a_test_stands_where_its_module_does():
    """`difftap/a/b.py` is tested by `tests/a/test_b.py`; a folder `a` by `tests/test_a.py` or `tests/a/test_a.py`."""
    tested = {path.relative_to(ROOT).with_suffix("") for path in ROOT.rglob("*.py")}
    tested |= {path.relative_to(ROOT.parent).with_suffix("") for path in ROOT.parent.glob("benchmarks/*.py")}
    for path in sorted(TESTS.rglob("test_*.py")):
        where = path.relative_to(TESTS).with_suffix("")
        named = where.with_name(where.name.removeprefix("test_"))
        of_a_folder = (ROOT / named).is_dir() or named.name == named.parent.name
        assert named in tested or of_a_folder or where.as_posix() in OF_MANY_MODULES, path


def test_matching_needs_numpy_and_the_vocabulary_alone():
    for path in sorted((ROOT / "matching").rglob("*.py")):
        outside = {name.split(".")[0] for name in _imports(path, top=True)} - set(sys.stdlib_module_names)
        assert outside <= {"numpy", "difftap"}, path


def test_heavy_packages_are_imported_inside_the_function_that_needs_them():
    heavy = {
        *("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "openvino", "nncf"),
        *("tensorrt", "tensorrt_rtx", "faiss", "pymilvus", "milvus_lite", "huggingface_hub", "pyarrow", "pycocotools"),
        *("matplotlib", "zarr", "fsspec", "ray", "scipy", "pandas"),
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
