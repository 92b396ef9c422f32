"""The study through its command, on data sets written here; the paper's axes on real configurations."""

import json
import re
from pathlib import Path

import pytest

from difftap.backbones.checkpoint import pocket_folder
from difftap.backbones.sd_unet import SDUNet
from difftap.errors import InputError, OutputError
from difftap.recipe import load_recipe
from difftap.study.axes import Case, columns, layer_cases, step_cases, table_name, union_recipe
from tests.datasets.builders import write_coco, write_davis, write_voc
from tests.harness import invoke

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
SMALL = ("--size", 128, "--draws", 20, "--threads", 1)


def run(*arguments):
    return invoke(["bench", "semantics", *map(str, arguments)])


def sd15() -> SDUNet:
    """Stable Diffusion 1.5 as it is published, without its weights."""
    config = json.loads((pocket_folder().parent / "configs" / "sd15.json").read_text())
    return SDUNet("sd15", Path("sd15"), config["unet"], config["vae"], config["scheduler"])


def test_layers_of_stable_diffusion_are_the_papers():
    cases = {case.label: case for case in layer_cases(sd15(), (512, 512), 0)}
    assert list(cases) == [
        "64+32+16", "64", "32", "16",
        "encoder 64", "encoder 32", "encoder 16", "decoder 64", "decoder 32", "decoder 16",
        "first, down2.attn0", "second, down2.attn1",
    ]  # fmt: skip
    assert cases["encoder 16"].taps == ("down2.attn0", "down2.attn1")
    assert cases["decoder 16"].taps == ("up1.attn0", "up1.attn1", "up1.attn2")
    assert cases["16"].taps == cases["encoder 16"].taps + cases["decoder 16"].taps
    assert cases["64+32+16"].taps == cases["64"].taps + cases["32"].taps + cases["16"].taps
    assert len(cases["64+32+16"].taps) == 15


def test_the_embedded_model_has_one_attention_layer_a_block(pocket):
    cases = layer_cases(pocket, (512, 512), 0)
    assert [case.label for case in cases if case.group == "layer"] == [
        "residual layer, down2.res0",
        "attention layer, down2.attn0",
    ]
    assert [case.label for case in cases][:4] == ["64+32+16", "64", "32", "16"]


def test_one_pass_serves_all_cases(pocket, tmp_path):
    recipe = load_recipe("pocket-semantics")
    cases = [
        *layer_cases(pocket, (512, 512), 0),
        *step_cases(("down2.attn0",), (1, 50)),
        Case("x", ("down2.attn0",), 0),
    ]
    union = union_recipe(recipe, pocket, cases)
    assert [branch.timestep for branch in union.branches] == [0, 1, 50]
    assert union.branches[1].taps == ("down2.attn0",)
    made = columns(recipe, pocket, cases, tmp_path)
    assert len({column.path for column in made}) == len(made) == 13  # of 15 cases; down2.attn0 is three of them
    for column in made:
        assert all(tap in union.branches[branch].taps for branch, tap in column.parts)
        assert column.recipe.branches[0].taps == tuple(tap for _, tap in column.parts)
        assert column.recipe.branches[0].timestep == union.branches[column.parts[0][0]].timestep
    again = [column for column in made if column.taps == "down2.attn0" and column.timestep == 0]
    assert [column.recipe.key() for column in again] == [recipe.key()]


def test_table_names_differ():
    long = tuple(f"up{k}.attn{n}" for k in range(1, 4) for n in range(3))
    assert table_name(("down2.attn0",), 5) == "down2.attn0.t005.parquet"
    assert len({table_name(long, 0), table_name(long[1:], 0), table_name(long, 1)}) == 3
    assert len(table_name(long * 9, 0)) < 60


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_voc(root / "voc")
    write_davis(root / "davis")
    return root


def test_distances_and_video_fill_one_report(data, tmp_path):
    out = tmp_path / "out"
    result = run("distances", "--voc", data / "voc", "-o", out, *SMALL)
    assert result.exit_code == 0, result.output
    assert "VOC 2012 (2 images), Euclidean distance: scsi < scdi < dcsi < dcdi" in result.stdout
    assert "published" in result.stdout
    results = json.loads((out / "distances.json").read_text())
    cases = results["datasets"]["voc"]["cases"]
    assert [case["metric"] for case in cases] == ["euclidean", "correlation", "manhattan", "cosine", "dcor"]
    counts = {name: one["count"] for name, one in cases[0]["sets"].items()}
    assert counts == {"scsi": 1, "scdi": 2, "dcsi": 3, "dcdi": 4, "sidi": 0}
    assert cases[0]["published_dunn"]["scsi-scdi"] == 0.30312
    assert results["datasets"]["voc"]["conditions"]["model"]["name"] == "pocket"
    first = (out / "distances.json").read_bytes(), (out / "figures/fig3-distances.svg").read_bytes()

    result = run("video", "--davis", data / "davis", "-o", out, *SMALL, "--offsets", "1,2,9")
    assert result.exit_code == 0, result.output
    offsets = json.loads((out / "video.json").read_text())["datasets"]["davis"]["offsets"]
    assert [(row["offset"], row["sidi"]["count"], row["scdi"]["count"]) for row in offsets] == [
        (1, 4, 4), (2, 2, 2), (9, 0, 0),
    ]  # fmt: skip
    assert sorted(path.name for path in (out / "figures").iterdir()) == [
        f"{name}.{kind}" for name in ("fig10-frames", "fig3-distances", "fig9-offsets") for kind in ("png", "svg")
    ]
    page = (out / "report.html").read_text()
    assert page.count("<img") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)  # self-contained
    for text in ("Distance measures", "Video", "Dunn index", "published", "epsilon squared", "sidi &lt; scdi"):
        assert text in page
    assert not list(out.rglob("*.parts")) + list(out.rglob("*.lock"))

    again = run("distances", "--voc", data / "voc", "-o", out, *SMALL)
    assert "to build" not in again.stderr  # the prototypes are there
    assert ((out / "distances.json").read_bytes(), (out / "figures/fig3-distances.svg").read_bytes()) == first


def test_transforms_compare_an_object_with_itself(data, tmp_path):
    out = tmp_path / "out"
    result = run("transforms", "--voc", data / "voc", "-o", out, *SMALL, "--metric", "cosine")
    assert result.exit_code == 0, result.output
    cases = json.loads((out / "transforms.json").read_text())["datasets"]["voc"]["cases"]
    assert len(cases) == 10
    assert all(case["sets"]["sidi"]["count"] == 5 for case in cases)
    assert all(case["trend"]["order"] == ["sidi", "scsi", "dcsi"] for case in cases)
    assert {case["sets"]["scsi"]["box"]["mean"] for case in cases} == {cases[0]["sets"]["scsi"]["box"]["mean"]}
    assert (out / "figures/fig8-transforms.png").stat().st_size > 5000


def test_steps_take_the_timesteps_given(data, tmp_path):
    result = run("steps", "--voc", data / "voc", "-o", tmp_path, *SMALL, "--timesteps", "1,500", "--rule", "nearest")
    assert result.exit_code == 0, result.output
    [one, other] = json.loads((tmp_path / "steps.json").read_text())["datasets"]["voc"]["cases"]
    assert (one["timestep"], other["timestep"]) == (1, 500)
    assert one["sets"]["dcdi"]["box"]["mean"] != other["sets"]["dcdi"]["box"]["mean"]


@pytest.mark.parametrize(
    ("axis", "extra", "message"),
    [
        ("distances", (), "no data set was given"),
        ("video", (), "no data set was given"),
        ("layers", ("--voc", "VOC", "--tap", "mid"), "leave --tap out"),
        ("steps", ("--voc", "VOC", "--timestep", "5"), "give --timesteps in place of --timestep"),
        ("steps", ("--voc", "VOC", "--timesteps", "1,x"), "--timesteps is '1,x'; allowed: whole numbers from 0 to 999"),
        ("all", ("--voc", "VOC", "--metric", "angle"), "--metric is 'angle'; allowed: euclidean"),
        ("all", ("--voc", "VOC", "--rule", "most"), "--rule is 'most'; allowed: area, nearest"),
        ("all", ("--voc", "VOC", "--split", "coco=val2017"), "--split names 'coco', which is not given"),
        ("distances", ("--voc", "VOC", "--recipe", "dual"), "the study's recipe has one branch, this one 2"),
        ("distances", ("--voc", "/nowhere"), "'/nowhere' does not exist"),
    ],
)
def test_bad_options(data, tmp_path, axis, extra, message):
    arguments = [str(data / "voc") if one == "VOC" else one for one in extra]
    result = run(axis, "-o", tmp_path / "out", *arguments)
    assert message in str(result.exception)
    assert isinstance(result.exception, InputError | OutputError)
    assert not list(tmp_path.rglob("*.json"))


def test_a_folder_of_another_study_is_refused(data, tmp_path):
    run("steps", "--voc", data / "voc", "-o", tmp_path, *SMALL, "--timesteps", "1")
    result = run("steps", "--voc", data / "voc", "-o", tmp_path, *SMALL, "--timesteps", "1", "--seed", "7")
    assert "was made under other conditions (recipe.seed is 0 there and 7 here)" in str(result.exception)
    result = run(
        "steps", "--voc", data / "voc", "-o", tmp_path, *SMALL, "--timesteps", "1", "--seed", "7", "--overwrite"
    )
    assert result.exit_code == 0, result.output


def test_axes_of_two_recipes_do_not_share_a_report(data, tmp_path):
    """Also where no table of prototypes has the same name, so that nothing else would notice."""
    args = ("--voc", data / "voc", "-o", tmp_path / "out", *SMALL)
    assert run("distances", *args).exit_code == 0
    result = run("steps", *args, "--timesteps", "1,50", "--seed", "5")
    assert result.exit_code == 2 or isinstance(result.exception, OutputError), result.output
    assert "other conditions (recipe.seed is 0 there and 5 here)" in str(result.exception)


def test_clips_of_other_things_than_people(data, tmp_path):
    for k, (more, clips) in enumerate([((), ["walking"]), (("--davis-classes", "all"), ["bear", "walking"])]):
        result = run("video", "--davis", data / "davis", "-o", tmp_path / str(k), *SMALL, "--offsets", "1", *more)
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / str(k) / "video.json").read_text())["datasets"]["davis"]["clips"]
        assert sorted(found) == clips
    write_davis(tmp_path / "own", {"kitchen": [{"_1": (k, 0, k + 15, 30), "_2": (22, 0, 38, 30)} for k in range(2)]})
    result = run("video", "--davis", tmp_path / "own", "-o", tmp_path / "c", *SMALL, "--offsets", "1")
    assert result.exit_code == 0, result.output
    assert "does not say which objects" in result.stderr


def test_overwrite_builds_every_table_once(data, tmp_path):
    for more in ((), ("--overwrite",)):
        result = run("video", "--davis", data / "davis", "-o", tmp_path, *SMALL, "--offsets", "1", *more)
        assert result.exit_code == 0, result.output
        assert result.stderr.count("to build") == 1


def test_the_backend_that_is_chosen_is_that_of_all_tables(data, tmp_path, monkeypatch):
    import difftap.pipeline.fastest

    chosen = difftap.pipeline.fastest.Choice("ort", "cpu", {}, (), {})
    monkeypatch.setattr(difftap.pipeline.fastest, "choose", lambda *_, **__: chosen)
    for times in (1, 0):
        result = run("distances", "--voc", data / "voc", "-o", tmp_path, *SMALL, "--backend", "auto")
        assert result.exit_code == 0, result.output
        assert result.stderr.count("to build") == times


def test_failed_images_are_counted_and_said(tmp_path):
    root = write_voc(tmp_path / "voc")
    (root / "SegmentationClass/b.png").write_bytes(b"no picture")
    result = run("distances", "--voc", root, "-o", tmp_path / "out", *SMALL)
    assert result.exit_code == 1
    assert "b failed: " in result.stderr
    assert "1 failed" in (tmp_path / "out/distances.md").read_text()


def test_a_damaged_result_is_no_part_of_a_report(data, tmp_path):
    (tmp_path / "steps.json").write_text("{}")
    result = run("distances", "--voc", data / "voc", "-o", tmp_path, *SMALL)
    assert "is no result of the study" in str(result.exception)


@pytest.mark.slow
def test_everything(tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("pycocotools")
    write_voc(tmp_path / "voc")
    write_coco(tmp_path / "coco")
    write_davis(tmp_path / "davis")
    roots = [f"--{name}={tmp_path / name}" for name in ("voc", "coco", "davis")]
    result = run("all", *roots, "-o", tmp_path / "out", *SMALL, "--timesteps", "1,100")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("tables of prototypes to build") == 5  # each set once, transforms of two, the clips
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<img") == 8
    assert len(list((tmp_path / "out/figures").glob("*.png"))) == 8
