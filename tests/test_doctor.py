"""``difftap doctor``: what is here, what is missing, and the line that brings it."""

import json
from pathlib import Path

import pytest

from difftap import machine
from difftap.doctor import SCHEMA, clashes, examine, extras, format_health
from difftap.engine import BACKENDS, Cache, get_backend
from difftap.errors import InputError
from tests.harness import invoke

DOCS = Path(__file__).parents[1] / "docs" / "throughput.md"


def test_every_backend_is_listed_with_what_it_has(tmp_path):
    health = examine(Cache(tmp_path / "none"))
    assert [one.name for one in health.backends] == list(BACKENDS)
    for one in health.backends:
        backend = get_backend(one.name)
        assert one.missing == backend.missing()
        if one.missing is None:
            assert one.version == backend.version()
            assert one.devices == backend.devices()
            assert set(one.precisions) == set(one.devices)
    assert not health.cache["exists"]
    assert health.cache["free"] > 0
    assert not (tmp_path / "none").exists()  # looking makes nothing


def test_what_is_missing_comes_with_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    lines = format_health(examine(Cache(tmp_path)))
    (line,) = [line for line in lines if line.startswith("  ort ")]
    assert "missing" in line
    assert "pip install onnxruntime" in line


def test_a_runtime_that_is_broken_does_not_hide_the_others(tmp_path, monkeypatch):
    def broken(self):
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(type(get_backend("ort")), "devices", broken)
    health = examine(Cache(tmp_path))
    assert "libcudart.so.12" in health.backends[0].missing
    assert len(health.backends) == len(BACKENDS)


def test_extras_are_those_of_the_project(monkeypatch):
    from importlib import metadata

    assert {"export", "bench", "dev"} <= set(extras())
    plain = metadata.distribution

    def hide(name):
        if name == "matplotlib":
            raise metadata.PackageNotFoundError(name)
        return plain(name)

    monkeypatch.setattr(metadata, "distribution", hide)
    assert extras()["bench"] == ("matplotlib",)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["numpy", "onnxruntime", "faiss-cpu"], []),
        (["onnxruntime", "onnxruntime_gpu"], ["onnxruntime and onnxruntime-gpu", "pip install onnxruntime-gpu"]),
        (["faiss-cpu", "faiss-gpu-cu12"], ["faiss-cpu and faiss-gpu-cu12", "module 'faiss'"]),
        (["onnxruntime", "onnxruntime-extensions", "faiss-gpu"], []),
    ],
)
def test_packages_that_break_one_another(names, words):
    found = " ".join(clashes(names))
    assert bool(found) == bool(words)
    assert all(word in found for word in words)


def test_the_cache_is_shown_with_what_is_broken(mini_cache, tmp_path):
    import shutil

    folder = tmp_path / "cache"
    shutil.copytree(mini_cache.folder, folder)
    manifest = next(folder.glob("*/*.json"))
    (manifest.parent / "half.json").write_text("{")
    health = examine(Cache(folder))
    assert sorted(item["name"] for item in health.artifacts if "name" in item) == [
        "unet.up1+down1.attn0.json",
        "vae.json",
    ]
    assert ["half.json" in item["broken"] for item in health.artifacts if "broken" in item] == [True]
    assert health.cache["bytes"] > 1000
    lines = format_health(health)
    assert any(line.startswith("  BROKEN") for line in lines)


def test_the_command(tmp_path):
    done = invoke(["doctor", "--cache", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["schema"] == SCHEMA
    documented = DOCS.read_text(encoding="utf-8")
    assert all(f"`{name}`" in documented for name in data if name != "schema")
    done = invoke(["doctor", "--cache", str(tmp_path), "--measure", "--size", "64", "--precision", "fp8"])
    assert "no backend here has precision fp8" in str(done.exception)
    refused = invoke(["doctor", "--size", "64"])
    assert isinstance(refused.exception, InputError)
    assert "give --measure" in str(refused.exception)


def test_the_machine_without_and_with_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpu() is None
    assert machine.gpu_memory() is None
    assert machine.cpu()
    assert machine.available_memory() > 1 << 20
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\ncase $1 in *name*) echo 'NVIDIA X';; *driver*) echo 1.2;; *used*) echo 300;; esac\n")
    program.chmod(0o755)
    assert machine.gpu() == "NVIDIA X, driver 1.2"
    assert machine.gpu_memory() == 300 << 20
    program.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpu() is None
