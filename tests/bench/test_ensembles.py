"""The curve of fidelity against passes: its arithmetic, its law on a known function, and what is written."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from difftap import Image, Pipeline, Runtime, load_recipe
from difftap.bench import ensembles
from difftap.bench.ensembles import KINDS, CurveCase, run_curve, worth
from difftap.bench.ensembles_report import SCHEMA, format_curve, save_curve
from difftap.cli import cli
from difftap.engine import Cache, get_backend
from difftap.errors import InputError
from difftap.recipe import Branch, Learned
from tests.conftest import picture

SMALL = dataclasses.replace(load_recipe("pocket"), size=(64, 64))
DOCS = Path(__file__).parents[2] / "docs" / "throughput.md"


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    case = CurveCase(SMALL, (1, 261), (1, 2, 4), 8)
    images = [Image(picture(1)), Image(picture(2, (50, 36)))]
    return run_curve(case, images, Runtime(threads=1, cache=tmp_path_factory.mktemp("cache")))


def test_every_kind_has_its_points(curve):
    for timestep in (1, 261):
        assert [p.passes for p in curve.at(timestep, KINDS[0])] == [1, 2, 4]
        for kind in KINDS[1:]:
            assert [p.passes for p in curve.at(timestep, kind)] == [2, 4]
        errors = [p.relative for p in curve.at(timestep, KINDS[0])]
        assert errors == sorted(errors, reverse=True)
    assert all(p.equals is None for p in curve.points if p.kind == KINDS[0])


def test_antithetic_pairs_are_closer_on_the_embedded_model(curve):
    """What its recipe's default was chosen by: at t = 1 both noises matter, and turning both cancels most."""
    plain, both, diffusion = (curve.at(1, kind)[-1].relative for kind in KINDS)
    assert both < 0.3 * plain
    assert both < 0.5 * diffusion


def test_the_independent_points_are_what_recipes_give(curve, tmp_path):
    """Four members of a recipe are as far from the limit, made by a recipe too, as the curve says."""
    case, image = curve.case, Image(picture(1))

    def feature(**change):
        recipe = dataclasses.replace(SMALL, **{"noise": "independent", **change})
        with Pipeline.open(recipe, Runtime(threads=1, cache=tmp_path)) as pipeline:
            return next(pipeline.extract([image])).data

    limit = feature(ensemble=case.limit, noise="antithetic", seed=SMALL.seed + 1)
    one = run_curve(dataclasses.replace(case, timesteps=(1,), passes=(4,)), [image], Runtime(threads=1, cache=tmp_path))
    wanted = np.linalg.norm(feature(ensemble=4) - limit) / np.linalg.norm(limit)
    assert one.at(1, KINDS[0])[0].relative == pytest.approx(wanted, rel=1e-3)


def test_engines_that_the_curve_builds_are_those_of_all_commands(tmp_path):
    """Calibrated, measured when they are built, and so measured again by ``engines verify``."""
    from difftap.pipeline.engines import list_artefacts, verify_artefact

    backend = get_backend("openvino")
    if backend.missing():
        pytest.skip(backend.missing())
    pytest.importorskip("nncf")
    recipe = dataclasses.replace(SMALL, branches=(Branch(("down2.attn0",), 1),))
    runtime = Runtime("openvino", "cpu", 1, cache=tmp_path, precision="int8")
    run_curve(CurveCase(recipe, (1,), (1, 2), 2), [Image(picture(1))], runtime)
    built = [one for one in list_artefacts(Cache(tmp_path)) if one.manifest.kind == "engine"]
    assert len(built) == 2
    for one in built:
        assert one.parity and verify_artefact(one, cache=Cache(tmp_path)) is None


class _Known:
    """Stands for an image whose members are a known function of their noise."""

    shape = (1, 8, 8)

    def __init__(self, function):
        self.run = lambda posterior, diffusion: function(posterior, diffusion).reshape(1, -1).astype(np.float64) + 10


def test_odd_parts_cancel_and_even_ones_do_not():
    case = CurveCase(SMALL, (1,), (2, 8), 4096)
    odd = ensembles._fidelity(case, _Known(lambda z, e: z + e**3), "ab" * 32)
    assert odd[KINDS[1], 2].relative < 1e-6
    assert odd[KINDS[2], 2].relative > 0.01  # the posterior's noise is left
    assert odd[KINDS[0], 8].relative > 0.01
    even = ensembles._fidelity(case, _Known(lambda z, e: e**2), "ab" * 32)
    # A pair of an even function is one draw, not two.
    assert even[KINDS[1], 8].relative == pytest.approx(even[KINDS[0], 8].relative * 2**0.5, rel=0.35)


@given(st.floats(0.01, 10), st.integers(1, 64))
def test_worth_on_a_line_is_the_number_of_passes(scale, passes):
    curve = [(n, scale / n**0.5) for n in (1, 2, 4, 8, 16)]
    assert worth(scale / passes**0.5, curve) == pytest.approx(passes, rel=1e-6)


def test_worth_where_the_curve_is_flat():
    assert worth(0.5, [(1, 1.0), (2, 1.0)]) == math.inf


def test_what_is_written(curve, tmp_path):
    files = save_curve(curve, tmp_path / "out")
    data = json.loads(files[0].read_text())
    assert data["schema"] == SCHEMA
    documented = DOCS.read_text(encoding="utf-8")
    assert all(f"`{name}`" in documented for name in (*data, *data["points"][0]))
    assert files[1].read_text().splitlines() == format_curve(curve)
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_bad_cases(tmp_path):
    for values, words in (
        ({"passes": (1, 3, 4)}, "divide the largest"),
        ({"passes": (1,)}, "divide the largest"),
        ({"limit": 7}, "even number"),
        ({"timesteps": ()}, "at least one"),
    ):
        with pytest.raises(InputError, match=words):
            CurveCase(SMALL, **values)
    with pytest.raises(InputError, match="leave the learned prompts out"):
        CurveCase(dataclasses.replace(SMALL, learned=Learned("prompts/mine")))
    with pytest.raises(InputError, match="no images"):
        run_curve(CurveCase(SMALL), [])
    with pytest.raises(InputError, match=r"timestep 1000 .*allowed: 0 to 999"):
        run_curve(CurveCase(SMALL, (1000,)), [Image(picture(1))], Runtime(cache=tmp_path))
    done = CliRunner().invoke(cli, ["bench", "throughput", "--ensemble-curve", "--curve-passes", "1,x"])
    assert done.exit_code == 2
    assert "whole numbers with commas" in done.output
