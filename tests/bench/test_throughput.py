"""The throughput benchmark at a small size: what it returns and how it fails, not how fast anything is."""

import dataclasses
import json
import signal
import time
from pathlib import Path

import pytest

from difftap import Pipeline, Runtime, load_recipe
from difftap.bench import throughput as bench
from difftap.bench.contenders import Contender, parse_backends, parse_rivals
from difftap.bench.pictures import choose_pictures, write_pictures
from difftap.bench.throughput import (
    OWN_STAGES,
    SCHEMA,
    Throughput,
    ThroughputCase,
    format_throughput,
    run,
    save_throughput,
    to_json,
)
from difftap.bench.worker_child import TimedPipeline
from difftap.bench.workers import Worker, call_timing, stage_medians
from difftap.engine import featurizer as extractor
from difftap.errors import BackendError, ImageError, InputError, OutputError
from difftap.images import load_image
from difftap.recipe import Learned
from tests.harness import invoke

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("threadpoolctl")
pytest.importorskip("onnx")
SMALL = dataclasses.replace(load_recipe("pocket"), size=(64, 64), ensemble=2)
DOCS = Path(__file__).parents[2] / "docs" / "throughput.md"


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Throughput:
    """Two rounds of DIFT's way, one backend, and a rival that cannot run."""
    case = ThroughputCase(
        dataclasses.replace(SMALL, branches=(dataclasses.replace(SMALL.branches[0], taps=("mid",)),)),
        (Contender("dift"), Contender("ort"), Contender("dift-tuned")),
        rounds=2,
        seconds=0,
        threads=1,
        resident=True,
        cache=tmp_path_factory.mktemp("cache"),
    )
    return run(case)


def test_every_contender_has_its_figures(result):
    for label in ("dift:fp32", "ort:fp32"):
        row = result.row(label)
        assert row.failed is None
        assert len(row.timing.seconds) == 2  # one call a round
        assert row.rate == pytest.approx(1 / row.timing.median)
        assert row.stages["vae"] > 0
        assert row.stages["unet"] > 0
        assert row.peak > 50e6
        assert row.matching > 0
        assert row.flop_rate == pytest.approx(row.flop / (row.stages["vae"] + row.stages["unet"]))
        assert row.gemm_share == pytest.approx(row.flop_rate / max(result.gemm.values()))
    assert set(result.gemm) == {"numpy fp32", "torch fp32"}


def test_ratios_and_arithmetic_are_to_dift_s_way(result):
    dift, ours = result.row("dift:fp32"), result.row("ort:fp32")
    assert dift.ratio == 1
    assert ours.ratio == pytest.approx(dift.timing.median / ours.timing.median)
    vae, unet = result.macs["vae"], result.macs["unet"]
    assert dift.flop == 2 * (2 * vae + 2 * unet)  # every member is encoded
    assert ours.flop == 2 * (vae + 2 * unet)
    assert (dift.own_share, dift.about["together"]) == (None, 2)


def test_stages_of_ours_add_up(result):
    row = result.row("ort:fp32")
    assert set(row.stages) == {"vae", "unet", *OWN_STAGES}
    assert all(value >= 0 for value in row.stages.values())
    assert 0 < row.own_share < 1


def test_features_are_compared_with_dift_s(result):
    assert result.reference == "dift:fp32"
    assert result.row("dift:fp32").fidelity["0.mid"].relative == 0
    assert 0 < result.row("ort:fp32").fidelity["0.mid"].relative <= 1e-4
    assert result.row("ort:fp32").fidelity["0.mid"].cosine_mean >= 1 - 1e-6


def test_one_that_fails_is_a_row_that_says_so(result):
    row = result.row("dift-tuned:fp32")
    assert "got taps mid; allowed: one of up0" in row.failed
    assert row.timing is None
    with pytest.raises(KeyError):
        result.row("tensorrt:fp16")


def test_json_text_and_picture(result, tmp_path):
    files = save_throughput(result, tmp_path / "out")
    assert [path.name for path in files] == ["throughput.json", "throughput.txt", "throughput.png"]
    assert files[2].read_bytes().startswith(b"\x89PNG")
    data = json.loads(files[0].read_text())
    assert data["schema"] == SCHEMA
    assert data == json.loads(json.dumps(to_json(result)))
    documented = DOCS.read_text(encoding="utf-8")
    for name in (*data, *data["rows"][0], *data["case"], *data["conditions"]):
        assert f"`{name}`" in documented, name
    text = "\n".join(format_throughput(result))
    assert files[1].read_text() == text + "\n"
    for words in ("pocket, 64 x 64, mid at t=1", "1.00x", "around the engine calls", "not measured: dift-tuned ends"):
        assert words in text


def test_fresh_processes_give_the_same_features(tmp_path):
    case = ThroughputCase(SMALL, (Contender("ort"),), rounds=2, seconds=0, threads=1, matching=False, resident=False)
    said = []
    one = run(case, said.append)
    assert said == ["making the model and its graphs ready", "round 1 of 2: ort:fp32", "round 2 of 2: ort:fp32"]
    row = one.row("ort:fp32")
    assert len(row.timing.seconds) == 2
    assert (one.reference, row.ratio, row.matching) == ("ort:fp32", None, None)
    assert one.conditions["resident"] is False


def test_a_process_that_is_killed_says_so_and_takes_nobody_along():
    with Worker(1) as worker:
        worker._process.send_signal(signal.SIGKILL)
        with pytest.raises(BackendError, match="killed, most likely for want of memory"):
            worker.ask("gemm", device="cpu")
    with Worker(1) as worker:
        for _ in range(2):  # what goes wrong is a reply, and the process goes on
            with pytest.raises(BackendError, match="KeyError"):
                worker.ask("nothing")


def test_what_is_timed_as_an_engine_call_and_what_is_not(monkeypatch, tmp_path):
    """A pause in each stage must show in that stage, and engine calls made of one another count once."""
    paths = write_pictures(tmp_path, 1, (40, 30))
    with Pipeline.open(SMALL, Runtime(threads=1)) as pipeline:
        pauses = {"noise": 0.15, "resize": 0.2, "vae": 0.25, "unet": 0.3}

        def slow(plain, seconds):
            def paused(*args, **kwargs):
                time.sleep(seconds)
                return plain(*args, **kwargs)

            return paused

        monkeypatch.setattr(extractor, "draw_noise", slow(extractor.draw_noise, pauses["noise"]))
        monkeypatch.setattr(extractor, "to_input", slow(extractor.to_input, pauses["resize"]))
        for engine in pipeline.engines:
            inner = slow(engine._bound_run, pauses[engine.graph.component])
            monkeypatch.setattr(engine, "_bound_run", inner)
        kept = extractor.draw_noise
        ours = TimedPipeline(pipeline)
        _, maps, stages = ours.call(paths)
        ours.close()
        assert extractor.draw_noise is kept
    for stage, pause in pauses.items():
        assert pause <= stages[stage] < pause + 0.14, stages
    assert set(maps) == {"0.up2"}
    assert stages["total"] == pytest.approx(sum(v for k, v in stages.items() if k != "total"))


def test_names_of_contenders():
    found, absent = parse_backends("ort,torch:fp32,ort:fp32")
    assert found == [Contender("ort"), Contender("torch")]
    assert absent == {}
    assert Contender("ort") in parse_backends("all")[0]
    assert parse_rivals("dift, dift-tuned:fp16", "cuda") == [
        Contender("dift", "fp32", "cuda"),
        Contender("dift-tuned", "fp16", "cuda"),
    ]
    assert parse_rivals("none", "cpu") == []
    for text, words in (
        ("onnx", "no backend 'onnx'"),
        ("ort:fp8", "has no precision 'fp8'"),
        ("ort:half", "asks for precision 'half'; allowed: fp32"),
    ):
        with pytest.raises((InputError, BackendError), match=words):
            parse_backends(text)
    with pytest.raises(InputError, match="no rival 'dino'; allowed: dift, dift-tuned, none"):
        parse_rivals("dino", "cpu")
    with pytest.raises(InputError, match="asks for precision 'int8'"):
        parse_rivals("dift:int8", "cpu")


def test_a_backend_that_is_not_here_is_told_or_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    found, absent = parse_backends("all")
    assert "pip install onnxruntime" in absent["ort"]
    assert Contender("ort") not in found
    with pytest.raises(BackendError, match="pip install onnxruntime"):
        parse_backends("ort")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"seconds": -1.0}, "seconds is -1"),
        ({"contenders": ()}, "no backend and no rival"),
        ({"recipe": dataclasses.replace(SMALL, noise="none", ensemble=1)}, "--rivals none"),
        ({"recipe": dataclasses.replace(SMALL, learned=Learned("prompts/mine"))}, "has learned prompts"),
        (
            {"recipe": dataclasses.replace(SMALL, branches=SMALL.branches * 2, combine="score-product")},
            "score-product",
        ),
    ],
)
def test_cases_that_make_no_sense(change, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(ThroughputCase(SMALL, (Contender("dift"),)), **change)


def test_memory_decides_whether_processes_stay(monkeypatch):
    case = ThroughputCase(SMALL, (Contender("dift"), Contender("ort")))
    monkeypatch.setattr(bench, "available_memory", lambda: 24 << 30)
    assert bench._fits(case, {"weights": 10 << 20})
    assert not bench._fits(case, {"weights": 4 << 30})


def test_medians_are_of_an_image():
    calls = [{"images": 2, "total": t, "vae": 1.0, "unet": 1.0, "rest": t - 2} for t in (4.0, 2.5, 8.0)]
    assert call_timing(calls).median == 2.0  # of an image
    assert stage_medians(calls) == {"vae": 0.5, "unet": 0.5, "rest": 1.0}


def test_generated_pictures_are_seeded_pictures(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, again = write_pictures(tmp_path / "a"), write_pictures(tmp_path / "b")
    for one, other in zip(first, again, strict=True):
        image = load_image(one)
        assert image.size == (500, 375)
        assert image.pixels.std() > 30
        assert (image.pixels == load_image(other).pixels).all()
    assert not (load_image(first[0]).pixels == load_image(first[1]).pixels).all()


def test_a_folder_stands_for_some_of_its_pictures(tmp_path):
    with pytest.raises(InputError, match="no pictures in"):
        choose_pictures([tmp_path])
    for k in range(20):
        (tmp_path / f"{k:02}.jpg").touch()
    (tmp_path / "notes.txt").touch()
    assert [int(path.stem) for path in choose_pictures([tmp_path], 4)] == [0, 5, 10, 15]
    assert choose_pictures([tmp_path / "03.jpg", tmp_path / "none.jpg"]) == (tmp_path / "03.jpg", tmp_path / "none.jpg")


def test_bad_input_is_refused_before_anything_is_measured(tmp_path):
    def refused(*arguments):
        done = invoke(["bench", "throughput", *map(str, arguments)])
        assert done.exit_code != 0
        assert not done.stdout
        return done.exception

    assert isinstance(refused("--image", tmp_path / "none.jpg"), ImageError)
    assert "no rival" in str(refused("--rivals", "dino"))
    assert "no backend and no rival" in str(refused("--backends", "none", "--rivals", "none"))
    assert "an even number" in str(refused("--noise", "antithetic", "--ensemble", "3"))
    (tmp_path / "file").touch()
    assert isinstance(refused("--backends", "ort", "-o", tmp_path / "file"), OutputError)
