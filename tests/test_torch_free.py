"""The base install matches images: nothing that only an extra installs may be imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image as PIL

from tests.harness import child_environment

EXAMPLES = Path(__file__).parents[1] / "examples"
BLOCK = """
import sys
BLOCKED = {"torch", "torchvision", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "openvino", "tensorrt",
           "tensorrt_rtx", "nncf", "faiss", "huggingface_hub", "accelerate", "scipy", "matplotlib", "threadpoolctl",
           "zarr", "fsspec", "pyarrow", "ray", "pymilvus", "milvus_lite", "pycocotools", "polygraphy"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named '{name}' (blocked)", name=name)
sys.meta_path.insert(0, Blocker())
"""
MAIN = "from difftap.cli import main\nmain()\n"


def blocked(code, *arguments, cwd):
    command = [sys.executable, "-W", "error", "-c", BLOCK + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, env=child_environment())


def test_the_blocker_blocks(tmp_path):
    done = blocked("import torch", cwd=tmp_path)
    assert "(blocked)" in done.stderr
    assert done.returncode == 1


def test_import_loads_nothing_but_itself(tmp_path):
    code = (
        "before = set(sys.modules)\nimport difftap\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    done = blocked(code, cwd=tmp_path)
    assert done.stdout.strip() == "['difftap']", done.stderr


HELP = """
import click
from click.testing import CliRunner  # and not the harness, which loads numpy and more
from difftap.cli import cli
def walk(command, path):
    done = CliRunner().invoke(cli, [*path, "--help"])
    assert done.exit_code == 0 and done.stdout.startswith("Usage:"), (path, done.output, done.exception)
    print("difftap", *path)
    if isinstance(command, click.Group):
        for name in command.list_commands(None):
            walk(command.get_command(None, name), [*path, name])
walk(cli, [])
heavy = {"numpy", "PIL", "onnxruntime", "rich"} & set(sys.modules)
assert not heavy, heavy
"""


def test_every_help_works_and_loads_nothing_heavy(tmp_path):
    done = blocked(HELP, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    for command in ("", " match", " export", " engines build", " engines verify", " recipes", " taps", " bench"):
        assert f"difftap{command}" in shown


def test_matching_two_photographs(tmp_path):
    pair = EXAMPLES / "collins.jpg", EXAMPLES / "hopper.jpg"
    done = blocked(
        MAIN, "match", *pair, "--point", "120,130", "--point", "60,200", "-o", "out.png", "--heat", "1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    record = json.loads(done.stdout)
    assert len(record["matches"]) == 2
    assert record["recipe"]["model"] == "pocket"
    with PIL.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG"
        assert picture.size[0] > picture.size[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("export",),
        ("export", "--tap", "up3"),
        ("match", EXAMPLES / "collins.jpg", EXAMPLES / "hopper.jpg", "--backend", "torch"),
        ("match", EXAMPLES / "collins.jpg", EXAMPLES / "hopper.jpg", "--tap", "up3"),
        ("taps", "--model", "sd15"),
        ("taps", "--model", "sd15", "--random-weights", "0"),
        ("taps", "--model", "someone/checkpoint"),
    ],
)
def test_a_missing_extra_answers_with_the_pip_line(tmp_path, arguments):
    done = blocked(MAIN, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "pip install 'difftap[export]'" in line
    assert done.stdout == ""
