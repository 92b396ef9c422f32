"""The command line: data on stdout, one line on stderr for bad input, exit codes, nothing half-written."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PIL

import difftap.cli
import difftap.images
from difftap.backbones.checkpoint import pocket_folder
from tests.harness import ROOT, picture, write_picture

QUICK = ("--size", "64", "--ensemble", "1")
COMMAND = Path(sys.executable).with_name("difftap")


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command in this process: gives exit code, stdout and stderr."""
    root = logging.getLogger()
    kept = list(root.handlers), root.level, logging.getLogger("difftap").level

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["difftap", *map(str, arguments)])
        code = 0
        try:
            difftap.cli.main()
        except SystemExit as leaving:
            code = leaving.code
        out, err = capsys.readouterr()
        return code, out, err

    yield run
    root.handlers, root.level = kept[0], kept[1]
    logging.getLogger("difftap").setLevel(kept[2])


@pytest.fixture
def refused(call, tmp_path):
    """Run the command on bad input: it must say one line, exit with 2 and leave no file; gives the line."""

    def run(*arguments):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        code, out, err = call(*arguments)
        after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert code == 2, (out, err)
        assert out == ""
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert err.startswith("error: ")
        made = {
            path.relative_to(tmp_path).as_posix()
            for path in after
            if after[path] != before.get(path) and path.is_file()
        }
        assert not {name for name in made if not name.startswith("cache/")}, made
        return err

    return run


def test_json_holds_the_documented_fields(call, photos):
    code, out, err = call("match", *photos, *QUICK, "--point", "3,4", "--point", "39.5,29.5")
    assert (code, err) == (0, "")
    record = json.loads(out)
    documented = (ROOT / "docs" / "output.md").read_text()
    for name in record:
        assert f"`{name}`" in documented
    assert (record["type"], record["schema"]) == ("match", 1)
    assert record["recipe"]["size"] == [64, 64]
    assert len(record["recipe_key"]) == 16
    assert (record["source"]["width"], record["source"]["height"], record["target"]["width"]) == (40, 30, 50)
    assert record["source"]["path"] == str(photos[0])
    assert [m["source"] for m in record["matches"]] == [{"x": 3.0, "y": 4.0}, {"x": 39.5, "y": 29.5}]
    for match in record["matches"]:
        assert set(match) == {"source", "target", "score", "margin", "cycle_error"}
        assert all(f"`{name}`" in documented for name in match)
        assert 0 <= match["target"]["x"] <= 49
        assert 0 <= match["target"]["y"] <= 35
        assert -1 <= match["score"] <= 1
        assert match["cycle_error"] >= 0


def test_an_image_matches_itself(call, photos):
    # Points half a cell or more from the border: beyond it a small map is constant, and the first of equals wins.
    _, out, _ = call("match", photos[0], photos[0], *QUICK, "--grid", "2")
    matches = json.loads(out)["matches"]
    assert len(matches) == 4
    for match in matches:
        assert abs(match["source"]["x"] - match["target"]["x"]) <= 0.5
        assert abs(match["source"]["y"] - match["target"]["y"]) <= 0.5
        assert match["score"] > 0.99  # a fractional point is read between pixels


def test_every_way_to_choose_points(call, photos, tmp_path):
    (tmp_path / "p.csv").write_text("x,y\n1,2\n30,20\n")
    (tmp_path / "p.json").write_text('{"points": [[1, 2], {"x": 30, "y": 20}]}')
    results = [
        call("match", *photos, *QUICK, *way)[1]
        for way in (
            ("--points", tmp_path / "p.csv"),
            ("--points", tmp_path / "p.json"),
            ("--point", "1,2", "--point", "30,20"),
        )
    ]
    assert results[0] == results[1] == results[2]
    assert len(json.loads(call("match", *photos, *QUICK)[1])["matches"]) == 25
    assert len(json.loads(call("match", *photos, *QUICK, "--grid", "3")[1])["matches"]) == 9
    scores = [m["score"] for m in json.loads(call("match", *photos, *QUICK, "--mutual")[1])["matches"]]
    assert scores
    assert scores == sorted(scores, reverse=True)


def test_thresholds_keep_the_sure_ones(call, photos):
    everything = json.loads(call("match", *photos, *QUICK)[1])["matches"]
    for option, name, sign in (
        ("--min-score", "score", 1),
        ("--min-margin", "margin", 1),
        ("--max-cycle-error", "cycle_error", -1),
    ):
        limit = sorted(m[name] for m in everything)[10]
        kept = json.loads(call("match", *photos, *QUICK, option, limit)[1])["matches"]
        assert 0 < len(kept) < 25
        assert all(sign * m[name] >= sign * limit - 1e-3 for m in kept)


@pytest.mark.parametrize("matcher", ["dense", "nn", "softargmax", "kernel-softargmax", "window-softargmax", "mutual"])
def test_every_matcher_runs(call, photos, matcher):
    code, out, _ = call("match", *photos, *QUICK, "--matcher", matcher, "--grid", "2")
    assert code == 0
    assert len(json.loads(out)["matches"]) == 4


def test_options_change_the_recipe_and_its_key(call, photos):
    keys = set()
    changes = [
        (),
        ("--seed", "1"),
        ("--timestep", "30"),
        ("--interpolation", "bicubic"),
        ("--prompt", "a photo of a cat"),
        ("--ensemble", "3"),
    ]
    for change in changes:
        code, out, err = call("match", *photos, "--size", "64", "--grid", "1", *change)
        assert code == 0, err
        keys.add(json.loads(out)["recipe_key"])
    assert len(keys) == len(changes)


def test_usual_and_unusual_pictures_are_matched(call, tmp_path):
    exif = PIL.Exif()
    exif[0x0112] = 6
    base = PIL.fromarray(picture(1))
    base.convert("CMYK").save(tmp_path / "cmyk.jpg")
    base.convert("RGBA").save(tmp_path / "alpha.png")
    base.save(tmp_path / "turned.jpg", exif=exif)
    base.save(tmp_path / "moving.gif", save_all=True, append_images=[base.rotate(90)])
    PIL.fromarray(picture(1)[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("cmyk.jpg", "alpha.png", "turned.jpg", "moving.gif", "deep.png"):
        code, out, err = call("match", tmp_path / name, tmp_path / "alpha.png", *QUICK, "--grid", "1")
        assert (code, err) == (0, ""), name
        assert json.loads(out)["source"]["width"] == (30 if name == "turned.jpg" else 40)


def test_a_picture_and_a_heat_map(call, photos, tmp_path):
    for name in ("o.png", "o.jpg", "o.webp"):
        code, _, err = call("match", *photos, *QUICK, "--point", "5,5", "-o", tmp_path / name, "--heat", "1")
        assert (code, err) == (0, "")
        with PIL.open(tmp_path / name) as drawn:
            assert drawn.size[1] > 480


BAD_IMAGES = ["none.png", "text.png", "zero.png", "cut.jpg", ".", "a" * 300, "huge.png"]


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.parametrize("place", [0, 1])
def test_bad_images(refused, photos, tmp_path, monkeypatch, name, place):
    (tmp_path / "text.png").write_text("no picture\nat all")
    (tmp_path / "zero.png").write_bytes(b"")
    write_picture(tmp_path / "cut.jpg", (90, 90), seed=1)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:700])
    write_picture(tmp_path / "huge.png", (90, 91), seed=1)
    monkeypatch.setattr(difftap.images, "MAX_PIXELS", 90 * 90)
    pair = list(photos)
    pair[place] = tmp_path / name
    assert str(tmp_path / name) in refused("match", *pair, *QUICK, "-o", tmp_path / "out.png")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--point", "40,10"), "point 40,10 lies outside"),
        (("--point", "-1,10"), "point -1,10 lies outside"),
        (("--point", "nose"), "'nose'"),
        (("--point", "nan,1"), "finite"),
        (("--points", "none.csv"), "none.csv"),
        (("--points", "bad.csv"), "line 2"),
        (("--points", "bad.json"), "not valid JSON"),
        (("--grid", "0"), "1 to 512"),
        (("--grid", "3", "--mutual"), "--grid and --mutual exclude"),
        (("--tap", "up9"), "no tap 'up9'"),
        (("--tap", "conv_in"), "no tap 'conv_in'"),
        (("--recipe", "nope"), "no recipe 'nope'; presets: pocket"),
        (("--recipe", "bad.toml"), "unknown field 'steps'"),
        (("--model", "nope"), "no model 'nope'"),
        (("--model", "x" * 300), "no model"),
        (("--model", ""), "model"),
        (
            ("--backend", "nope"),
            "no backend 'nope'; allowed: ort, openvino, torch, tensorrt",
        ),
        (("--device", "tpu"), "no device 'tpu'"),
        (("--matcher", "best"), "matcher is 'best'; allowed: dense"),
        (("--interpolation", "cubic"), "interpolation is 'cubic'"),
        (("--size", "65"), "multiples of 64"),
        (("--size", "4"), "size"),
        (("--size", "100000"), "size"),
        (("--ensemble", "0"), "ensemble is 0"),
        (("--seed", "-1"), "seed is -1"),
        (("--timestep", "1000"), "timestep is 1000"),
        (("--random-weights", "1"), "--random-weights builds sd15, sd21 or sdxl"),
        (("--revision", "main"), "--revision"),
        (("--heat", "1"), "-o FILE"),
        (("--heat", "26", "-o", "out.png"), "1 to 25"),
        (("-o", "out.gif"), r"'.gif'; allowed: .png"),
        (("-o", "none/out.png"), "folder does not exist"),
        (("-o", "folder.png"), "a folder stands there"),
        (("-o", "bad.csv/out.png"), "its folder does not exist"),
        (("--overwrite",), "--overwrite goes with --pairs"),
        (("--recipe", "dual", "--tap", "up1"), "--tap and --timestep change one branch"),
    ],
)
def test_bad_options(refused, photos, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text("x,y\na,b\n")
    (tmp_path / "bad.json").write_text("[[1, 2")
    (tmp_path / "bad.toml").write_text('steps = 3\nbranches = [{ taps = ["up1"], timestep = 20 }]\n')
    (tmp_path / "folder.png").mkdir()
    quick = [] if "--size" in arguments or "--recipe" in arguments or "--ensemble" in arguments else QUICK
    assert words in refused("match", *photos, *quick, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("a.png",),
        ("--pairs", "p.csv"),
        ("--pairs", "p.csv", "-o", "o", "--heat", "1"),
        ("a.png", "b.png", "--pairs", "p.csv", "-o", "o"),
    ],
)
def test_incomplete_commands(refused, arguments):
    refused("match", *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("mach",),
        ("match", "--no-such"),
        ("match", "a", "b", "--grid", "x"),
        ("match", "a", "b", "--size", "5²"),
        ("match", "a", "b", "--size", "x"),
        ("match", "a", "b", "--threads", "0"),
    ],
)
def test_usage_errors(call, arguments):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "Error: " in err
    assert "Traceback" not in err


@pytest.fixture
def copied(tmp_path):
    """A copy of the embedded model, to be damaged, with the options that match with it."""
    shutil.copytree(pocket_folder(), tmp_path / "model")
    return tmp_path / "model", ("--recipe", "pocket", "--model", tmp_path / "model", *QUICK)


def test_a_copy_of_the_embedded_model_gives_the_same_matches(call, photos, copied):
    want = json.loads(call("match", *photos, *QUICK)[1])
    got = json.loads(call("match", *photos, *copied[1])[1])
    assert got["matches"] == want["matches"]
    assert got["model"]["key"] == want["model"]["key"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: shutil.rmtree(m / "unet"), "no UNet"),
        (
            lambda m: (m / "unet" / "diffusion_pytorch_model.safetensors").rename(
                m / "unet" / "diffusion_pytorch_model.bin"
            ),
            "pickled",
        ),
        (lambda m: (m / "unet" / "config.json").write_text("{"), "JSON"),
        (lambda m: (m / "unet.up2.onnx").write_bytes((m / "unet.up2.onnx").read_bytes()[:1000]), "1000 bytes"),
        (lambda m: _flip(m / "unet.up2.onnx"), "SHA-256 differs"),
        (lambda m: _flip(m / "unet" / "diffusion_pytorch_model.safetensors"), "came with the model"),
        (lambda m: (m / "unet.up2.json").write_text("{"), "damaged"),
        (lambda m: (m / "vae.onnx").unlink(), "is missing"),
        (lambda m: (m / "prompt_table" / "model.safetensors").write_bytes(b"abc"), "prompt table"),
        (lambda m: shutil.rmtree(m / "prompt_table"), "text encoder"),
        (lambda m: (m / "scheduler" / "scheduler_config.json").write_text('{"beta_schedule": "odd"}'), "'odd'"),
    ],
)
def test_damaged_models(refused, photos, copied, damage, words):
    damage(copied[0])
    assert words in refused("match", *photos, *copied[1], "-o", photos[0].parent / "out.png")


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def full_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(refused, call, photos, full_disk, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    PIL.fromarray(noise).save(tmp_path / "noise.png")
    assert "the disk is full" in refused(
        "match", tmp_path / "noise.png", photos[1], *QUICK, "-o", full_disk / "out.png"
    )
    (tmp_path / "pairs.csv").write_text("source,target\n" + "a.png,b.png\n" * 60)
    code, _, err = call(
        "match", "--pairs", tmp_path / "pairs.csv", "-o", full_disk / "out.jsonl", *QUICK, "--grid", "6"
    )
    assert code == 2
    assert "the disk is full" in err
    assert err.count("\n") == 1
    for line in (full_disk / "out.jsonl").read_bytes().split(b"\n")[:-1]:
        json.loads(line)  # what is there is whole, but for the line that did not fit


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_stdout_on_a_full_disk(photos):
    with open("/dev/full", "w") as full:
        done = subprocess.run([COMMAND, "match", *photos, *QUICK], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")


def test_a_reader_that_leaves_early_hears_nothing(photos):
    running = subprocess.Popen([COMMAND, "match", *photos, *QUICK], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.close()
    assert running.stderr.read() == b""
    running.stderr.close()
    running.wait()


def test_the_cache_need_not_be_writable_to_match(call, photos, monkeypatch):
    monkeypatch.setenv("DIFFTAP_CACHE", "/dev/null/cache")
    code, _, err = call("match", *photos, *QUICK)
    assert (code, err) == (0, "")


def test_the_same_command_twice_gives_the_same_bytes(photos, tmp_path):
    results = []
    for name in ("one.png", "two.png"):
        command = [COMMAND, "match", *photos, "--point", "7,8", "--prompt", "a photo of a dog", "-o", tmp_path / name]
        done = subprocess.run(command, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
        results.append((done.stdout, (tmp_path / name).read_bytes()))
    assert results[0] == results[1]


def test_the_launcher_is_the_command(photos):
    launcher = ROOT / "cli.py"
    done = [
        subprocess.run([*start, "match", *photos, *QUICK], capture_output=True)
        for start in ((COMMAND,), (sys.executable, launcher))
    ]
    assert done[0].returncode == 0
    assert done[0].stdout == done[1].stdout


def test_pairs_report_a_bad_one_and_exit_with_one(call, photos, tmp_path):
    (tmp_path / "pairs.csv").write_text('source,target,points\na.png,b.png,"1,2;3,4"\na.png,none.png,\nb.png,a.png,\n')
    arguments = ("match", "--pairs", tmp_path / "pairs.csv", "-o", tmp_path / "out.jsonl", *QUICK, "--grid", "2")
    code, out, err = call(*arguments)
    assert (code, out) == (1, "")
    assert "3 pairs written" in err
    assert "pair 1: no image at" in err
    assert "1 failed" in err
    header, *rest = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert header["settings"]["grid"] == 2
    assert [len(r.get("matches", ())) for r in rest] == [2, 0, 4]
    single = json.loads(call("match", *photos, *QUICK, "--point", "1,2", "--point", "3,4")[1])
    assert rest[0]["matches"] == single["matches"]
    assert "other conditions" in call(*arguments[:-1], "3")[2]
    assert call(*arguments, "--overwrite")[0] == 1


@pytest.mark.parametrize(
    "text", ["", "a,b\n", "source,target\n", "source,target\na.png\n", 'source,target,points\na.png,b.png,"9"\n']
)
def test_malformed_lists(refused, tmp_path, photos, text):
    (tmp_path / "pairs.csv").write_text(text)
    refused("match", "--pairs", tmp_path / "pairs.csv", "-o", tmp_path / "out.jsonl", *QUICK)


def test_taps_recipes_version_and_help(call):
    code, out, _ = call("taps")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["tap", "channels", "stride", "module"]
    assert any(row[0] == "up1" and row[3] == "up_blocks.1" for row in rows)
    assert call("recipes", "dift")[1].startswith("branches = ")
    assert call("--version")[1].startswith("difftap, version ")
    for arguments in ((), ("--help",), ("match", "-h")):
        code, out, err = call(*arguments)
        assert "Usage" in out + err
    assert "no recipe 'nope'" in call("recipes", "nope")[2]


def test_engines_are_built_listed_verified_and_cleaned(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFTAP_CACHE", "cache")  # relative, as a user may well write it
    code, out, err = call("engines", "build", *QUICK)
    assert code == 0, err
    assert "2 graphs and engines" in call("engines", "list")[1]
    code, out, _ = call("engines", "verify")
    assert (code, out.count("whole")) == (0, 2), out
    next(Path("cache").rglob("unet*.engine.json")).write_text("no manifest")
    assert "BROKEN" in call("engines", "list")[1]
    code, out, _ = call("engines", "verify")
    assert (code, out.count("whole"), out.count("BROKEN")) == (1, 1, 1), out
    code, out, _ = call("engines", "clean")
    assert code == 0
    assert "0 graphs and engines" in call("engines", "list")[1]
