"""TensorRT for RTX itself: its builder needs no GPU, so building, keeping and checking engines is tested everywhere."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from difftap.engine import Cache
from difftap.engine.trt.gpu import find_gpu
from difftap.errors import ArtifactError
from difftap.pipeline.engines import build_engines, list_artifacts, verify_artifact
from difftap.pipeline.environment import Runtime
from difftap.recipe import ModelReference, load_recipe

pytestmark = pytest.mark.skipif(find_gpu() is not None, reason="what a machine without a GPU does")
pytest.importorskip("tensorrt_rtx")

RECIPE = dataclasses.replace(load_recipe("pocket"), size=(256, 256), ensemble=2)
BUILD = "from difftap.cli import main; main()"


def run(cache: Path, *arguments: str, **more) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", BUILD, *arguments, "--cache", str(cache)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **more)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A cache with pocket's VAE and its UNet to up2 at 256 px, built for tensorrt-rtx. Leave it as it is."""
    cache = tmp_path_factory.mktemp("rtx")
    assert len(list(build_engines(RECIPE, Runtime(backend="tensorrt-rtx", cache=cache)))) == 2
    return cache


def test_engines_are_built_listed_and_checked_without_a_gpu(built):
    vae, unet = sorted(list_artifacts(Cache(built)), key=lambda one: "unet" in one.path.name)
    for one in (vae, unet):
        assert one.manifest.made_from["compute_capabilities"] == ["8.0", "8.6", "8.9", "12.0", "12.1"]
        assert "sees no NVIDIA GPU" in one.not_run
        assert one.manifest.report["build"]["weights"] == "inside"
        assert "parity" not in one.manifest.report
        assert "sees no NVIDIA GPU" in verify_artifact(one)
        (plan,) = one.path.with_name(one.path.name.removesuffix(".engine.json")).iterdir()
        assert plan.name == "plan" and plan.stat().st_size == one.manifest.report["build"]["plan_bytes"]
    assert unet.path.name == "unet.up2.tensorrt-rtx-cuda.256x256.e2.t8.b1.fp32.engine.json"


def test_a_second_build_finds_them(built, monkeypatch):
    import tensorrt_rtx

    monkeypatch.setattr(tensorrt_rtx, "Builder", None)  # whoever builds again fails
    assert len(list(build_engines(RECIPE, Runtime(backend="tensorrt-rtx", cache=built)))) == 2


def test_running_them_is_refused_in_one_line(built):
    done = run(
        built, "match", "examples/collins.jpg", "examples/hopper.jpg", "--point", "9,9", "--backend", "tensorrt-rtx"
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "can be built here ('difftap engines build') but not run" in line


def test_the_commands_say_what_they_did(built):
    from tests.harness import invoke

    where = ["--cache", str(built)]
    done = invoke(["engines", "build", "--backend", "tensorrt-rtx", "--recipe", "pocket", *where])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("can be built here ('difftap engines build') but not run") == 2
    done = invoke(["engines", "verify", *where])
    assert done.exit_code == 0 and done.stdout.count("(engines of backend 'tensorrt-rtx' can be") == 2


def test_what_was_changed_is_broken_and_another_version_too(built, tmp_path):
    copy = tmp_path / "moved"
    shutil.copytree(built, copy)  # a cache may be carried elsewhere
    one = next(one for one in list_artifacts(Cache(copy)) if "vae" in one.path.name)
    verify_artifact(one)
    older = {**one.manifest.made_from, "backend_version": "1.0"}
    with pytest.raises(ArtifactError, match=r"made with tensorrt-rtx 1.0, installed is .*; build it again"):
        verify_artifact(dataclasses.replace(one, manifest=dataclasses.replace(one.manifest, made_from=older)))
    plan = one.path.with_name(one.path.name.removesuffix(".engine.json")) / "plan"
    with open(plan, "r+b") as handle:
        handle.seek(1000)
        handle.write(b"tampered")
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        verify_artifact(one)


def test_a_killed_build_leaves_nothing_and_two_at_once_make_one(tmp_path):
    """Pocket's VAE alone: small, and all that the protocol needs."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from difftap.engine import Cache, Profile, get_backend\nfrom difftap.engine.builds import ensure_built\n"
        "from difftap.engine.graphfiles import shipped_graph\n"
        "from difftap.backbones.checkpoint import Checkpoint, pocket_folder\n"
        "cache, model = Cache(Path(sys.argv[1])), Checkpoint.load(pocket_folder(), 'pocket')\n"
        "graph = shipped_graph(cache, model, 'vae')\n"
        "print(ensure_built(cache, graph, get_backend('tensorrt-rtx'), Profile((256, 256)), 'cuda'))\n"
    )

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)

    first = start()
    end = time.monotonic() + 120
    while not list(tmp_path.glob("*/.vae*.part")) and first.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.005)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert list_artifacts(Cache(tmp_path)) == [] and not list(tmp_path.glob("*/vae*"))
    both = [start(), start()]
    told = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and told[0] == told[1]
    (one,) = list_artifacts(Cache(tmp_path))
    verify_artifact(one)
    assert not list(tmp_path.glob("*/.vae*.part"))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = run(tmp_path, "engines", "build", "--backend", "tensorrt-rtx", preexec_fn=limit)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [done.stderr.splitlines()[-1]]
    assert "cannot write" in done.stderr
    assert not list(tmp_path.rglob("plan")) and list_artifacts(Cache(tmp_path)) == []


@pytest.mark.slow
def test_a_full_size_unet_is_built_without_a_gpu(tmp_path):
    """Stable Diffusion 1.5 at 512 px to up1: minutes and 10 GB."""
    recipe = dataclasses.replace(load_recipe("dift"), model=ModelReference("sd15", random_weights=0), size=(512, 512))
    runtime = Runtime(backend="tensorrt-rtx", cache=tmp_path, precision="fp16")
    for record, _ in build_engines(recipe, runtime):
        assert record.not_run and verify_artifact(record)
        assert record.manifest.report["build"]["plan_bytes"] > 50e6
