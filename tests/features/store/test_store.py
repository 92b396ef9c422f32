"""A store gives back what was put in, says what it is, and refuses what does not belong."""

import dataclasses
import json
import uuid

import numpy as np
import pytest

from difftap.errors import ArtifactError, DifftapError, InputError, OutputError, RecipeError
from difftap.featuremap import FeatureMap
from difftap.features.store import Encoding, FeatureStore, check_writable, open_writer
from difftap.features.store.encoding import Moments, shapes_of, store_image
from difftap.features.store.place import Place
from difftap.features.store.writer import Shard
from difftap.recipe import Branch
from tests.features.store.cases import CONDITIONS, RECIPE, fill, made, maps, writer
from tests.harness import invoke

zarr = pytest.importorskip("zarr")

ENCODINGS = [Encoding(), Encoding("float32"), Encoding("int8"), Encoding("int8", "map")]


@pytest.fixture(params=["local", "memory"])
def path(request, tmp_path):
    return str(tmp_path / "s.zarr") if request.param == "local" else f"memory://{uuid.uuid4()}/s.zarr"


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda one: f"{one.dtype}-{one.scale}")
def test_what_goes_in_comes_out(path, encoding):
    assert fill(path, range(11), encoding, bad={3}) == 11
    store = FeatureStore.open(path)
    assert store.keys() == [f"k{n}" for n in range(11) if n != 3]
    assert dict(store.failures) == {"k3": "no good"}
    for number in (0, 5, 10):
        want, got = made(number), store.read(f"k{number}")
        assert got.digest == want.digest
        assert store.find(want.digest) == f"k{number}"
        assert [list(taps) for taps in got.branches] == [list(taps) for taps in want.branches]
        for one, other in zip(maps(got), maps(want), strict=True):
            assert one.geometry == other.geometry
            assert (one.data == encoding.decode(encoding.encode(other.data))).all()
            assert (
                np.abs(one.data - other.data).max() < {"float32": 1e-9, "float16": 2e-3, "int8": 0.02}[encoding.dtype]
            )
    assert store.find("0" * 64) is None
    assert len(store) == 10
    assert [one.digest for one in store] == [store[i].digest for i in range(10)]


def test_plain_zarr_reads_it(path):
    fill(path, range(6))
    group = zarr.open(path, mode="r")
    assert group["0/up1"].shape == (6, 6, 3, 4)
    assert group["0/up1"].dtype == np.float16
    assert group["0/up1"].shards == (4, 6, 3, 4)
    assert (group["0/up1"][4] == made(4).branches[0]["up1"].data.astype(np.float16)).all()
    assert list(group["key"][:]) == [f"k{n}" for n in range(6)]
    assert group["digest"][2].tobytes().hex() == made(2).digest
    geometry = made(5).branches[0]["up1"].geometry
    assert tuple(group["image"][5]) == geometry.image
    assert tuple(group["content"][5]) == geometry.content
    noted = group.attrs["difftap"]
    assert noted["conditions"] == json.loads(json.dumps(CONDITIONS))
    assert noted["complete"] is True
    assert {name for name, _ in group.members(max_depth=None)} >= {"0/down1.attn0", "1/up2", "journal"}


@pytest.mark.parametrize("parts", [[6, 5], [1] * 5, [4, 4, 1], [3, 0, 9], [12]])
def test_a_run_goes_on_where_the_last_one_ended(path, parts):
    """Whatever the runs were, the store is the same."""
    numbers = iter(range(sum(parts)))
    for part in parts:
        fill(path, [next(numbers) for _ in range(part)])
    whole = path + "-whole"
    fill(whole, range(sum(parts)))
    first, second = FeatureStore.open(path), FeatureStore.open(whole)
    assert first.keys() == second.keys()
    for key in second.keys():  # noqa: SIM118
        for one, other in zip(maps(first.read(key)), maps(second.read(key)), strict=True):
            assert (one.data == other.data).all()
    assert first.taps[0].values.shape[0] == sum(parts)


def test_pca(path):
    moments = {}
    for number in range(4):
        for branch, taps in enumerate(made(number).branches):
            for tap, one in taps.items():
                moments.setdefault(f"{branch}/{tap}", Moments()).add(one.data)
    bases = {name: one.basis(2) for name, one in moments.items()}
    encoding = Encoding("float32", pca=2)
    for part in (range(5), range(5, 9)):
        with writer(path, encoding) as opened:
            if not opened.ready:
                opened.prepare(shapes_of(made(0)), bases)
            for number in part:
                opened.add(f"k{number}", made(number))
            opened.finish()
    store = FeatureStore.open(path)
    assert store.taps[0].values.shape == (9, 2, 3, 4)
    for number in (0, 8):
        for array, got, want in zip(store.taps, maps(store.read(f"k{number}")), maps(made(number)), strict=True):
            basis = bases[array.name]
            cells = want.data.reshape(len(want.data), -1) - basis.mean[:, None]
            near = basis.components.T @ (basis.components @ cells) + basis.mean[:, None]
            assert np.allclose(got.data, near.reshape(want.data.shape), atol=1e-4)


CHANGES = {
    "seed": {"seed": 1},
    "size": {"size": (48, 64)},
    r"branches\[1\].timestep": {"branches": (RECIPE.branches[0], Branch(("up2",), 51))},
    "branches": {"branches": RECIPE.branches[:1]},
    "ensemble": {"ensemble": 2},
    "fit": {"fit": "letterbox"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_recipe_that_does_not_fit_is_refused_by_its_first_field(path, name):
    fill(path, range(2))
    store = FeatureStore.open(path)
    store.check(RECIPE, "ab" * 8)
    store.check(dataclasses.replace(RECIPE, upsample="bilinear", model="elsewhere"), "ab" * 8)
    with pytest.raises(RecipeError, match=rf"made with {name} = "):
        store.check(dataclasses.replace(RECIPE, **CHANGES[name]), "ab" * 8)
    with pytest.raises(RecipeError, match=r"key abab.*key cdcd"):
        store.check(RECIPE, "cd" * 8)


def test_a_prompt_that_stays_empty_is_an_empty_prompt(path):
    """Without a category, 'a photo of a {category}' is left out as a whole, on both sides."""

    def prompted(text):
        return dataclasses.replace(
            RECIPE, branches=tuple(dataclasses.replace(branch, prompt=text) for branch in RECIPE.branches)
        )

    for stored in ("", "a {category}"):
        with open_writer(
            f"{path}{len(stored)}", CONDITIONS, prompted(stored).feature_fields(), Encoding(), shard=4
        ) as opened:
            opened.add("k0", made(0))
            opened.finish()
        store = FeatureStore.open(f"{path}{len(stored)}")
        for asked in ("", "a {category}", "the {category} itself"):
            store.check(prompted(asked), "ab" * 8)
        with pytest.raises(RecipeError, match=r"branches\[0\].prompt = '', and 'a cat' is asked for"):
            store.check(prompted("a cat"), "ab" * 8)


def test_learned_prompts_are_known_by_their_content(path):
    """A prompt that was learned again, under the same path, gives other features."""
    first, second = ({"kind": "single", "mode": "all", "sha256": one * 64} for one in "12")
    what = RECIPE.feature_fields(), Encoding()
    with open_writer(path, {**CONDITIONS, "prompts": first}, *what, shard=4):
        pass
    store = FeatureStore.open(path)
    store.check(RECIPE, "ab" * 8, first)
    for other in (second, None):
        with pytest.raises(RecipeError, match="learned prompts 111111111111, and"):
            store.check(RECIPE, "ab" * 8, other)
        conditions = CONDITIONS | ({} if other is None else {"prompts": other})
        with (
            pytest.raises(OutputError, match=r"other conditions \(prompts"),
            open_writer(path, conditions, *what, shard=4),
        ):
            pass


@pytest.mark.parametrize("encoding", [Encoding("float32"), Encoding("int8"), Encoding(pca=2)])
def test_a_run_under_other_conditions_is_refused(path, encoding):
    fill(path, range(2))
    with pytest.raises(OutputError, match=r"other conditions \(encoding\.\w+ is .*--overwrite"):
        fill(path, range(2, 4), encoding)
    assert len(FeatureStore.open(path)) == 2
    with writer(path, Encoding("float32"), overwrite=True) as opened:
        assert not opened.done
        opened.add("k9", made(9))
        opened.finish()
    assert FeatureStore.open(path).keys() == ["k9"]


def test_keys_that_are_not_there(path):
    fill(path, range(2), bad={1})
    store = FeatureStore.open(path)
    with pytest.raises(InputError, match=r"no image 'x'.*'k0'"):
        store.read("x")
    with pytest.raises(InputError, match=r"could not be used.*no good"):
        store.read("k1")


def test_what_is_no_store(tmp_path):
    with pytest.raises(InputError, match=r"no feature store at.*difftap extract"):
        FeatureStore.open(tmp_path / "none")
    zarr.create_group(tmp_path / "foreign")
    with pytest.raises(InputError, match="no feature store"):
        FeatureStore.open(tmp_path / "foreign")
    with pytest.raises(OutputError, match=r"no feature store.*nothing was written"):
        fill(tmp_path / "foreign", range(2), overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty and is no feature store"):
        fill(tmp_path / "full", range(2), overwrite=True)
    with pytest.raises(OutputError, match="cannot write"):
        fill(tmp_path / "full" / "notes.txt", range(2))
    with pytest.raises(OutputError, match="its folder does not exist"):
        fill(tmp_path / "none" / "s.zarr", range(2))
    with pytest.raises(InputError):
        FeatureStore.open("nosuchscheme://x/y")


def test_what_cannot_be_written_is_said_beforehand(tmp_path):
    """By `check_writable`, in the words of `open_writer`; it leaves everything as it is."""
    fill(tmp_path / "s.zarr", range(2))
    (tmp_path / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    fields = RECIPE.feature_fields()
    check_writable(tmp_path / "s.zarr", fields, Encoding())
    check_writable(tmp_path / "new.zarr", fields, Encoding())
    other = dataclasses.replace(RECIPE, seed=1).feature_fields()
    check_writable(tmp_path / "s.zarr", other, Encoding("int8"), overwrite=True)
    for path, asked, encoding, words in (
        ("s.zarr", other, Encoding(), r"recipe\.seed is 0 there and 1 here"),
        ("s.zarr", fields, Encoding("int8"), r"encoding\.dtype is 'float16' there"),
        ("none/s.zarr", fields, Encoding(), "its folder does not exist"),
        ("notes.txt", fields, Encoding(), "cannot write"),
        (".", fields, Encoding(), "is not empty and is no feature store"),
    ):
        with pytest.raises(OutputError, match=words):
            check_writable(tmp_path / path, asked, encoding)
    with writer(tmp_path / "s.zarr"), pytest.raises(OutputError, match="another run is writing it"):
        check_writable(tmp_path / "s.zarr", fields, Encoding())
    assert sorted(tmp_path.rglob("*")) == before


def test_two_writers_are_one_too_many(tmp_path):
    with writer(tmp_path / "s.zarr") as first:
        first.add("k0", made(0))
        with pytest.raises(OutputError, match="another run is writing it"):
            fill(tmp_path / "s.zarr", [1])
        first.finish()
    fill(tmp_path / "s.zarr", [1])
    assert FeatureStore.open(tmp_path / "s.zarr").keys() == ["k0", "k1"]
    assert [file.name for file in tmp_path.iterdir()] == ["s.zarr"]


def test_nothing_is_safe_before_it_was_said(tmp_path):
    """What `add` and `commit` count is in the journal, neither more nor less."""
    safe = 0
    with writer(tmp_path / "s.zarr") as opened:
        for number in range(10):
            safe += opened.add(f"k{number}", made(number))
            assert len(FeatureStore.open(tmp_path / "s.zarr")) == safe
        assert safe == 8
        safe += opened.commit()
        assert len(FeatureStore.open(tmp_path / "s.zarr")) == safe == 10
        assert opened.commit() == 0


def test_time_commits_what_waits(tmp_path):
    now = [0.0]
    with writer(tmp_path / "s.zarr", every=5, clock=lambda: now[0]) as opened:
        assert opened.add("k0", made(0)) == 0
        now[0] = 6
        assert opened.add("k1", made(1)) == 2
        assert opened.add("k2", made(2)) == 0


def test_an_error_of_the_run_keeps_what_is_finished(tmp_path):
    with pytest.raises(ZeroDivisionError), writer(tmp_path / "s.zarr") as opened:
        opened.add("k0", made(0))
        raise ZeroDivisionError
    assert FeatureStore.open(tmp_path / "s.zarr").keys() == ["k0"]


def test_a_value_that_does_not_fit_is_the_images_fault(tmp_path):
    with writer(tmp_path / "s.zarr") as opened:
        opened.add("k0", made(0))
        opened.add("k1", made(1, scale=1e6))
        opened.add("k2", made(2))
        opened.finish()
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert store.keys() == ["k0", "k2"]
    assert "float16 holds up to" in store.failures["k1"]


def test_what_is_gone_or_changed_is_never_read_as_features(tmp_path):
    fill(tmp_path / "s.zarr", range(3))
    [shard] = [path for path in (tmp_path / "s.zarr" / "0" / "up1" / "c").rglob("*") if path.is_file()]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5] + bytes([whole[5] ^ 1]) + whole[6:])
    store = FeatureStore.open(tmp_path / "s.zarr")
    with pytest.raises(ArtifactError, match=r"'0/up1' of 'k0' in '.*' is damaged.*store verify"):
        store.read("k0")
    shard.unlink()  # zarr reads zeros
    for key in ("k0", "k1", "k2"):
        with pytest.raises(ArtifactError, match="is damaged"):
            store.read(key)


@pytest.mark.parametrize("name", ["0/up1/zarr.json", "journal/c/0", "journal/zarr.json"])
@pytest.mark.parametrize("command", ["info", "verify"])
def test_damaged_files_of_the_store_are_one_clear_line(tmp_path, name, command):
    fill(tmp_path / "s.zarr", range(3))
    path = tmp_path / "s.zarr" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = invoke(["store", command, str(tmp_path / "s.zarr")])
    assert isinstance(done.exception, DifftapError), done.exception
    assert "s.zarr" in str(done.exception)


def test_a_row_without_arrays_is_refused(tmp_path):
    with writer(tmp_path / "s.zarr") as opened:
        shard = Shard(opened.group, opened.place, opened.provenance, [], 0)
        with pytest.raises(InputError, match="the store arrays of none"):
            shard.add("k0", store_image(made(0), Encoding(), {}))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_shard_has_nothing_of_the_one_before(tmp_path, dtype):
    encoding = Encoding(dtype)
    fill(tmp_path / "one.zarr", range(6), encoding)  # the second shard, of four rows, has two
    fill(tmp_path / "two.zarr", range(4), encoding)
    fill(tmp_path / "two.zarr", range(4, 6), encoding)
    rows = [path for path in (tmp_path / "one.zarr" / "0").rglob("*") if path.is_file() and "c" in path.parts]
    files = [path.relative_to(tmp_path / "one.zarr") for path in rows]
    assert len(files) >= 4
    for path in files:
        assert (tmp_path / "one.zarr" / path).read_bytes() == (tmp_path / "two.zarr" / path).read_bytes()


def test_a_failure_that_later_succeeds_is_none(tmp_path):
    fill(tmp_path / "s.zarr", range(3), bad={1})
    fill(tmp_path / "s.zarr", [1])
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert not store.failures
    assert store.keys() == ["k0", "k2", "k1"]


def test_a_damaged_journal_is_said(tmp_path):
    fill(tmp_path / "s.zarr", range(6))
    group = zarr.open(tmp_path / "s.zarr", mode="r+")
    group["journal"][1] = "{"
    with pytest.raises(ArtifactError, match="page 1 of the journal"):
        FeatureStore.open(tmp_path / "s.zarr")


def test_a_map_of_another_shape_is_refused(tmp_path):
    other = made(1)
    cut = FeatureMap(other.branches[0]["up1"].data[:, :2], other.branches[0]["up1"].geometry)
    wrong = dataclasses.replace(other, branches=({**other.branches[0], "up1": cut}, other.branches[1]))
    with writer(tmp_path / "s.zarr") as opened:
        opened.add("k0", made(0))
        with pytest.raises(InputError, match=r"'0/up1' of 'k1' is stored as \(6, 2, 4\), .* are \(6, 3, 4\)"):
            opened.add("k1", wrong)


def test_what_a_remote_store_says_is_one_clear_line(monkeypatch):
    place = Place("memory://somewhere/s.zarr")

    def refuse(error):
        def call(*_given, **_options):
            raise error

        return call

    for error, words in (
        (ImportError("no s3fs\nat all"), "needs another package: no s3fs$"),
        (ValueError("what protocol"), "cannot be opened: what protocol"),
        (PermissionError("not yours"), "cannot be opened: not yours"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(zarr.storage.FsspecStore, "from_url", refuse(error))
            with pytest.raises(InputError, match=f"'memory://somewhere/s.zarr' {words}"):
                place.open()
    with monkeypatch.context() as patch:
        patch.setattr(zarr, "open_group", refuse(RuntimeError("403\nno")))
        with pytest.raises(InputError, match=r"cannot be opened as a feature store \(RuntimeError: 403\)"):
            place.open()
        patch.setattr(zarr, "create_group", refuse(RuntimeError("503\nlater")))
        with pytest.raises(OutputError, match=r"cannot write 'memory://somewhere/s.zarr': RuntimeError: 503$"):
            place.create({})


def test_a_damaged_provenance_and_a_lost_array_are_said(tmp_path):
    fill(tmp_path / "s.zarr", range(2))
    group = zarr.open_group(tmp_path / "s.zarr", mode="r+")
    noted = dict(group.attrs["difftap"])
    group.attrs["difftap"] = {**noted, "shard": "many"}
    with pytest.raises(InputError, match=r"has a damaged provenance .*; extract it again"):
        FeatureStore.open(tmp_path / "s.zarr")
    group.attrs["difftap"] = noted
    del group["1/up2"]
    with pytest.raises(ArtifactError, match="lacks the array '1/up2'"):
        FeatureStore.open(tmp_path / "s.zarr").read("k0")


def test_the_index_of_rows_over_several_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("difftap.features.store.writer._INDEX_ROWS", 3)
    fill(tmp_path / "s.zarr", range(8))
    group = zarr.open_group(tmp_path / "s.zarr", mode="r")
    for number in range(8):
        geometry = made(number).branches[0]["up1"].geometry
        assert group["key"][number] == f"k{number}"
        assert group["digest"][number].tobytes().hex() == made(number).digest
        assert tuple(group["image"][number]) == geometry.image
        assert tuple(group["content"][number]) == geometry.content
