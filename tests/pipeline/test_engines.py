"""Engines built, listed, measured, and measured again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from difftap.cli import cli
from difftap.engine import Cache, get_backend
from difftap.errors import ArtifactError, BackendError, InputError, MissingExtraError
from difftap.pipeline.engines import Artifact, build_engines, list_artifacts, plan_builds, verify_artifact
from difftap.pipeline.environment import Runtime
from difftap.pipeline.pipeline import Pipeline
from difftap.recipe import Branch, Recipe

RECIPE = Recipe(model="pocket", size=(64, 64), ensemble=2, branches=(Branch(("down2.attn0",), 100),))


def needs(*names: str) -> None:
    for name in names:
        if get_backend(name).missing():
            pytest.skip(get_backend(name).missing())


def engines(cache: Path) -> list[Artifact]:
    found = list_artifacts(Cache(cache))
    assert all(isinstance(one, Artifact) for one in found), found
    return [one for one in found if one.manifest.kind == "engine"]


def test_builds_are_planned_over_sizes_backends_and_precisions():
    needs("openvino")
    runtime = Runtime(device="cpu")
    jobs = plan_builds(RECIPE, runtime, ["ort", "openvino"], ["fp32", "int8"], [(64, 64), (128, 64)])
    assert [job.label for job in jobs] == [
        f"{size} {what}"
        for size in ("64x64", "128x64")
        for what in ("ort fp32", "openvino fp32", "openvino int8")  # ort has no int8
    ]
    every = plan_builds(RECIPE, runtime, ["all"], ["all"], [])
    assert {job.runtime.backend for job in every} >= {"ort", "openvino"}
    assert {job.recipe.size for job in every} == {(64, 64)}
    assert len(every) == len({job.label for job in every})
    (chosen,) = plan_builds(RECIPE, runtime, ["auto"], ["fp32"], [])
    assert chosen.label == "64x64 auto fp32"
    with pytest.raises(InputError, match="'auto' compares backends in one precision; got 'all'"):
        plan_builds(RECIPE, runtime, ["auto"], ["all"], [])
    with pytest.raises(InputError, match="no backend 'none'"):
        plan_builds(RECIPE, runtime, ["none"], ["fp32"], [])
    with pytest.raises(BackendError, match="backend 'ort' has no precision 'int8' on cpu; allowed: fp32"):
        plan_builds(RECIPE, runtime, ["ort"], ["int8"], [])
    with pytest.raises(BackendError, match="none of the backends ort, openvino has precision 'fp8' here"):
        plan_builds(RECIPE, runtime, ["ort", "openvino"], ["fp8"], [])


def test_auto_is_built_where_it_is_fastest(tmp_path, monkeypatch):
    from difftap.pipeline import fastest as auto
    from tests.harness import invoke

    monkeypatch.setattr(auto, "BACKENDS", {"ort": ""})  # alone, so that nothing has to be measured
    where = ["--backend", "auto", "--size", "64", "--cache", str(tmp_path)]
    done = invoke(["engines", "build", *where], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert {one.manifest.made_from["backend"] for one in engines(tmp_path)} == {"ort"}


@pytest.fixture(scope="module")
def int8(tmp_path_factory) -> Path:
    """A cache with the int8 engines of `RECIPE`. Copy what you change."""
    needs("openvino")
    pytest.importorskip("nncf")
    folder = tmp_path_factory.mktemp("int8")
    built = list(build_engines(RECIPE, Runtime("openvino", "cpu", cache=folder, precision="int8")))
    assert [one.manifest.made_from["component"] for one, _ in built] == ["vae", "unet"]
    return folder


def test_an_int8_engine_is_measured_stored_and_near_enough(int8):
    assert len(engines(int8)) == 2
    for one in engines(int8):
        report = one.manifest.report
        assert report["build"]["images"] == 6 and len(report["build"]["calibration"]) == 16
        assert set(report["parity"]) == set(one.parity)
        for name, parity in one.parity.items():
            assert parity.cosine_mean > 0.99, name
            assert parity.relative > 1e-3, "computed in float32 after all?"
        assert any(name.endswith("model.bin") for name in one.manifest.files)


def test_an_int8_engine_is_used_as_it_is_and_gives_the_same_bytes(int8, photos, monkeypatch):
    from difftap.images import load_image

    def refuse(*_args, **_kwargs):
        raise AssertionError("built again")

    monkeypatch.setattr(type(get_backend("openvino")), "build", refuse)
    runtime = Runtime("openvino", "cpu", threads=1, cache=int8, precision="int8")
    maps = []
    for _ in range(2):
        with Pipeline.open(RECIPE, runtime) as pipeline:
            assert pipeline.conditions["backend"]["precision"] == "int8"
            maps.append(next(pipeline.extract([load_image(photos[0])])).data)
    assert maps[0].tobytes() == maps[1].tobytes()


def test_verify_measures_again_and_notices_a_worse_engine(int8):
    cache = Cache(int8)
    for one in engines(int8):
        assert verify_artifact(one, cache=cache) is None
    one = engines(int8)[0]
    kept = one.path.read_text()
    try:
        data = json.loads(kept)
        for parity in data["report"]["parity"].values():
            parity["relative"] /= 2
        data.pop("sha256")
        one.path.write_text(json.dumps(data))
        worse = next(a for a in engines(int8) if a.path == one.path)
        assert verify_artifact(worse, cache=cache, quick=True) is None
        with pytest.raises(ArtifactError, match=r"with a relative error of .*; when it was built it was .*; build it"):
            verify_artifact(worse, cache=cache)
    finally:
        one.path.write_text(kept)


def test_an_engine_of_another_version_is_refused_with_the_reason(int8, monkeypatch):
    one = engines(int8)[0]
    monkeypatch.setattr(type(get_backend("openvino")), "version", lambda self: "1999.1")
    with pytest.raises(ArtifactError, match=r"was made with openvino .*, installed is 1999.1; build it again"):
        verify_artifact(one, cache=Cache(int8), quick=True)


def test_quantising_without_nncf_says_how_to_get_it(tmp_path, monkeypatch):
    needs("openvino")
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(MissingExtraError, match=r"quantising to int8 needs the package 'nncf'.*difftap\[openvino\]"):
        next(build_engines(RECIPE, Runtime("openvino", "cpu", cache=tmp_path, precision="int8")))
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".xml", ".bin") or p.name.endswith(".engine.json")]


def test_one_size_or_several_but_not_both():
    with pytest.raises(InputError, match="--size and --sizes are both given"):
        cli(["engines", "build", "--size", "128", "--sizes", "256"], standalone_mode=False)
