"""The GPU check, as far as it goes on a CPU: cells, limits, what dies, going on, and the report."""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar

import pytest

from difftap.bench import gpucheck
from difftap.bench.contenders import Contender
from difftap.bench.gpucheck import (
    CellResult,
    FaissCheck,
    GpuCheck,
    GpuCheckCase,
    cells_of,
    check_faiss,
    format_gpu_check,
    present,
    run,
    to_json,
)
from difftap.bench.workers import Timing, Worker
from difftap.errors import BackendError, DifftapError, InputError, OutputError
from difftap.recipe import Learned, load_recipe
from tests.harness import invoke

RECIPE = load_recipe("pocket")
EXACT, HALF, ORT = (
    Contender("torch", "fp32", "cuda"),
    Contender("torch", "fp16", "cuda"),
    Contender("ort", "fp32", "cuda"),
)


def case(**changes) -> GpuCheckCase:
    return GpuCheckCase(RECIPE, (ORT, EXACT, HALF), sizes=((64, 64), (96, 96)), **changes)


def test_cells_begin_with_the_reference_and_come_once():
    cells = list(cells_of(case(batches=(1, 4))))
    assert len({cell.key for cell in cells}) == len(cells) == 2 * 3 * 2
    assert [cell.contender for cell in cells[::6]] == [EXACT, EXACT]
    on_cpu = [dataclasses.replace(one, device="cpu") for one in (ORT, EXACT)]
    assert len(list(cells_of(GpuCheckCase(RECIPE, tuple(on_cpu), "cpu", ((64, 64),), (1, 4, 8))))) == 2


def test_what_cannot_run_says_why():
    found, absent = present("all", "cpu")
    assert {"ort", "torch"} <= {one.name for one in found}
    assert "has no device 'cpu' here" in absent["tensorrt-rtx"] or "pip install" in absent["tensorrt-rtx"]
    assert set(absent) >= {"tensorrt", "tensorrt-rtx"}
    with pytest.raises(InputError, match="no backend 'onnx'"):
        present("onnx", "cpu")
    with pytest.raises(InputError, match="no backend can run"):
        GpuCheckCase(RECIPE, ())
    with pytest.raises(InputError, match="leave the learned prompts out"):
        GpuCheckCase(dataclasses.replace(RECIPE, learned=Learned("prompts/mine")), (ORT,))


class Pretend:
    """A worker that answers at once, or fails as its contender is told to."""

    opened: ClassVar[list[str]] = []
    failing: ClassVar[dict[str, str]] = {}

    def __init__(self, threads):
        self.made = 0

    def ask(self, do, limit=None, **order):
        if do == "open":
            label = f"{order['contender']['name']}:{order['contender']['precision']}"
            self.opened.append(f"{label} {order['recipe']['size'][0]} {order['batch']}")
            if label in self.failing:
                raise BackendError(self.failing[label])
            self.label = label
            about = {"open": 0.5, "version": "1", "device": order["contender"]["device"], "together": 8, "notes": []}
            return {"made": False, **about}
        import numpy as np

        with open(order["features"], "wb") as handle:
            np.savez(handle, **{"0.up1": np.ones((4, 3, 3), np.float32) * (1.001 if self.label == "torch:fp16" else 1)})
        return {"calls": [{"images": 2, "total": 0.2, "vae": 0.05, "unet": 0.1, "rest": 0.05}], "peak": 1}

    def close(self):
        pass


@pytest.fixture
def pretend(monkeypatch):
    monkeypatch.setattr("difftap.bench.workers.Worker", Pretend)
    monkeypatch.setattr(Pretend, "opened", [])
    monkeypatch.setattr(Pretend, "failing", {})
    return Pretend


def test_a_cell_that_dies_is_a_line_and_the_others_go_on(pretend, tmp_path):
    pretend.failing["ort:fp32"] = "CUDA out of memory"
    result = run(case(batches=(1, 4)), tmp_path / "out", {"tensorrt": "not installed"})
    failed = [one for _, one in result.cells if one.failed]
    assert len(failed) == 4 and {one.failed for one in failed} == {"CUDA out of memory"}
    sound = {one.key: one.sound for _, one in result.cells}
    assert sound["torch:fp16@cuda 64x64 batch 4"] is True
    assert sound["torch:fp32@cuda 64x64 batch 1"] is None  # the reference itself
    lines = format_gpu_check(result)
    assert sum("not run: CUDA out of memory" in line for line in lines) == 4
    assert "not run: tensorrt: not installed" in lines
    assert sum(line.startswith("fastest: 10 images/s") for line in lines) == 2
    data = json.loads(json.dumps(to_json(result), allow_nan=False))
    assert data["schema"] == "difftap.bench.gpu-check/1" and len(data["cells"]) == 12


def test_a_stopped_run_goes_on_and_another_one_is_refused(pretend, tmp_path, monkeypatch):
    whole = gpucheck._measure
    count = 0

    def stop(*arguments):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(gpucheck, "_measure", stop)
    with pytest.raises(KeyboardInterrupt):
        run(case(), tmp_path, {})
    with open(tmp_path / "gpu-check.jsonl", "a") as handle:
        handle.write('{"key": "half a li')
    monkeypatch.setattr(gpucheck, "_measure", whole)
    before = list(pretend.opened)
    result = run(case(), tmp_path, {})
    assert len(before) == 3 and len(pretend.opened) == len(result.cells) == 18
    assert len(set(pretend.opened)) == 18
    again = run(case(), tmp_path, {})
    assert len(pretend.opened) == 18 and again.cells == result.cells
    with pytest.raises(OutputError, match="other conditions"):
        run(case(seconds=1.0), tmp_path, {})
    run(case(seconds=1.0), tmp_path, {}, overwrite=True)
    assert len(pretend.opened) == 36


def test_features_that_are_off_are_called_so(pretend, tmp_path):
    key = "ort:fp32@cuda 64x64 batch 1"
    parity = {"max_abs": 1.0, "relative": 2e-3, "relative_max": 1.0, "cosine_mean": 1.0, "cosine_min": 1.0}
    timing = dataclasses.asdict(Timing.of([0.1]))
    one = CellResult(key, None, 10.0, timing, {"vae": 0.1, "unet": 0.1}, fidelity={"0.up1": parity})
    assert one.sound is False
    assert dataclasses.replace(one, fidelity={"0.up1": {**parity, "relative": 9e-4}}).sound is True
    half = dataclasses.replace(one, key=key.replace("fp32", "fp16"))
    assert half.sound is True
    assert dataclasses.replace(half, fidelity={"0.up1": {**parity, "cosine_mean": 0.98}}).sound is False
    result = run(case(batches=(1,)), tmp_path, {})
    cell = next(cell for cell, found in result.cells if found.key == key)
    lines = format_gpu_check(GpuCheck(result.case, ((cell, one),), {}, result.conditions))
    assert any(line.endswith("LOW") for line in lines) and "fastest: nothing was measured" in lines


def test_a_worker_that_takes_too_long_is_ended():
    with Worker(1) as worker, pytest.raises(DifftapError, match="longer than its limit"):
        worker.ask("open", 0.0)  # or else it would answer that the order is not whole


def test_faiss_finds_what_numpy_finds_or_says_what_lacks():
    done = check_faiss("cpu", 120)
    assert done.sound is True or "not installed" in done.reason, done
    lacking = check_faiss("cuda", 120)
    assert lacking.sound is True or "GPU support" in lacking.reason or "not installed" in lacking.reason
    assert "OTHER" in FaissCheck(None, False, 0.1, "cuda").line


def test_without_a_gpu_the_command_says_so_and_offers_a_dry_run(monkeypatch):
    monkeypatch.setattr("difftap.machine.gpu", lambda: None)
    done = invoke(["bench", "gpu-check"])
    assert isinstance(done.exception, InputError)
    assert "no NVIDIA GPU here" in str(done.exception) and "--device cpu --model pocket" in str(done.exception)


@pytest.mark.parametrize("option", [("--sizes", "0"), ("--sizes", "a,b"), ("--batches", ""), ("--limit", "0")])
def test_bad_options_are_refused(option):
    done = invoke(["bench", "gpu-check", *option])
    assert isinstance(done.exception, InputError) or done.exit_code == 2  # ours, or click's for a number out of range


def test_the_dry_run_end_to_end(tmp_path):
    out = tmp_path / "out"
    arguments = ["--device", "cpu", "--model", "pocket", "--sizes", "64", "--ensemble", "2", "--seconds", "0"]
    done = invoke(
        ["bench", "gpu-check", *arguments, "--backends", "ort,tensorrt-rtx", "--limit", "200", "-o", str(out)]
    )
    assert done.exit_code == 0, done.output
    data = json.loads((out / "gpu-check.json").read_text())
    (cell,) = data["cells"]
    assert cell["backend"] == "ort" and cell["rate"] > 0 and cell["failed"] is None
    assert "tensorrt-rtx" in data["absent"]
    assert "fastest: " in done.stdout and "not run: tensorrt-rtx: " in done.stdout
