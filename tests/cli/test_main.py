# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import contextlib
import io
import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch

import pyro_apd
from benchmarks.fuzz_files import sealed, split
from pyro_apd.cli.demo import one_thread, require_device
from pyro_apd.cli.main import main
from pyro_apd.diagnostics.html import pictures
from pyro_apd.models.frozen import FrozenTensors, digest
from pyro_apd.posterior.posterior import DistilledPosterior


def quick_demo(out, seed):
    """What a quick demo prints; pictures of its report are empty, since those of reports have tests of their own."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "picture", lambda draw, size, caption: pictures.Picture("data:", "data:", caption, 1))
        # Quick is too quick for a chain to forget its start, and it says so.
        warnings.simplefilter("ignore", pyro_apd.WarmupWarning)
        assert main(["demo", "--quick", "--seed", seed, "--out", str(out)]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """Folder and printed text of a quick demo."""
    out = tmp_path_factory.mktemp("demo")
    return out, quick_demo(out, "3")


def table(text):
    """The comparison alone: without timings and paths."""
    return [line for line in text.splitlines() if re.match(r"accuracy|NLL|ECE|mean |AUROC|weight sd|bytes", line)]


@pytest.mark.slow
def test_demo_writes_its_files_and_says_where(quick_run):
    out, text = quick_run
    assert len(table(text)) >= 8
    for name in ("posterior.safetensors", "chains.nc", "report.html"):
        assert (out / name).stat().st_size > 1000
        assert str(out / name) in text
    loaded = pyro_apd.DistilledPosterior.load(out / "posterior.safetensors")
    assert loaded.num_bytes == (out / "posterior.safetensors").stat().st_size


@pytest.mark.thorough
def test_same_seed_same_table_and_file(quick_run, tmp_path):
    one, text_one = quick_run
    text_two, text_other = quick_demo(tmp_path / "two", "3"), quick_demo(tmp_path / "other", "4")
    assert len(table(text_one)) >= 8
    assert table(text_one) == table(text_two)
    assert table(text_one) != table(text_other)
    assert (one / "posterior.safetensors").read_bytes() == (tmp_path / "two" / "posterior.safetensors").read_bytes()


@pytest.mark.slow
def test_demo_chains_open_in_arviz(quick_run):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz as az

        idata = az.from_netcdf(quick_run[0] / "chains.nc")
    assert idata.posterior.sizes["chain"] == 2
    assert bool((idata.posterior["net.0.weight"].std("draw") > 0).all())


def test_one_thread_inside_and_as_before_after(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"]) == 1
    assert torch.get_num_threads() == 2
    assert "OMP_NUM_THREADS" not in os.environ
    torch.set_num_threads(1)


def test_unusable_device():
    with pytest.raises(ValueError, match="--device nonsense"):
        require_device("nonsense")


def test_errors_are_one_line_and_status_2(capsys):
    assert main(["demo", "--quick", "--device", "nonsense"]) == 2
    assert "Try --device cpu" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert pyro_apd.__version__ in capsys.readouterr().out


FILES = Path(__file__).parents[1] / "files"


def test_inspect_prints_what_a_file_holds(capsys):
    assert main(["inspect", str(FILES / "posterior_v2_int8.safetensors")]) == 0
    text = capsys.readouterr().out
    for part in (
        "format 2, 14,206 bytes, int8",
        "pyro_apd 0.1.0",
        "521 numbers in 4 sites; 50 by default",
        "mix [3], Simplex(), by StickBreakingTransform",
        "kind=paper",
        "layers.6.weight [521, 16] I8, 8,336 bytes",
        "notes: second format",
        "loss (2 numbers)",
        "frozen      not known",
    ):
        assert part in text, part


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_inspect_says_what_each_part_takes(capsys, tmp_path, dtype):
    posterior = DistilledPosterior.load(FILES / "posterior_v3_subspace_int8.safetensors")
    posterior.save(tmp_path / "p", dtype=dtype)
    assert main(["inspect", str(tmp_path / "p")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("parts")]
    pairs = [pair.rpartition(" ") for pair in line.removeprefix("parts       in bytes: ").split(", ")]
    costs = {name: int(size.replace(",", "")) for name, _, size in pairs}
    assert list(costs) == ["frames", "means", "bases", "null parts", "modes", "noise", "rest"]
    assert sum(costs.values()) == pytest.approx((tmp_path / "p").stat().st_size, abs=4)
    width = 2 if dtype == "int8" else 4
    assert costs["modes"] == width * (posterior.generator.modes.numel() + posterior.generator.spread.numel())
    assert costs["null parts"] > costs["means"] > 1000


def test_inspect_names_frozen_weights(capsys, tmp_path):
    posterior = DistilledPosterior.load(FILES / "posterior_v2_float32.safetensors")
    values = {f"net.{i}.weight": torch.zeros(2) for i in range(10)}
    for count, is_whole, expected in ((0, False, "none"), (2, False, "digests only"), (10, True, ", ...; numbers")):
        some = dict(list(values.items())[:count])
        posterior.frozen = FrozenTensors({name: digest(value) for name, value in some.items()}, values=some)
        posterior.save(tmp_path / "p", frozen=is_whole)
        assert main(["inspect", str(tmp_path / "p")]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("frozen")]
        assert expected in line


def test_inspect_says_what_a_distillation_warned_of(capsys, tmp_path):
    posterior = DistilledPosterior.load(FILES / "posterior_v2_int8.safetensors")
    posterior.metadata |= {"warnings": ["The budget is too small.\n"], "calibration": {"residuals": {"rows": 0.1}}}
    posterior.save(tmp_path / "p")
    assert main(["inspect", str(tmp_path / "p")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert r"warning     The budget is too small.\n" in lines
    assert not any("warnings:" in line for line in lines)
    assert any(line.startswith("    residuals (logarithms of draws' disagreement") for line in lines)


def test_inspect_of_what_is_no_text_is_a_message(capsys, tmp_path):
    posterior = DistilledPosterior.load(FILES / "posterior_v2_float32.safetensors")
    posterior.save(tmp_path / "p")
    header, description, data = split((tmp_path / "p").read_bytes())
    description["training_log"] = {"loss": 3}
    (tmp_path / "p").write_bytes(sealed(header, description, data))
    for arguments in (["inspect"], ["inspect", "--json"]):
        assert main([*arguments, str(tmp_path / "p")]) == 2
        assert "'training_log'" in capsys.readouterr().err


def test_inspect_as_json(capsys):
    assert main(["inspect", "--json", str(FILES / "posterior_v2_float32.safetensors")]) == 0
    description = json.loads(capsys.readouterr().out)
    assert description["format"] == 2
    assert description["metadata"]["notes"] == "second format"
    assert [site["name"] for site in description["layout"]] == ["net.0.weight", "net.0.bias", "scale", "mix"]


def test_inspect_refuses_what_is_no_posterior(capsys, tmp_path):
    (tmp_path / "notes").write_text("not a posterior, but long enough to have a header")
    assert main(["inspect", str(tmp_path / "notes")]) == 2
    assert "not a safetensors file" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none")]) == 2


def test_inspect_writes_no_control_characters(capsys, tmp_path):
    posterior = DistilledPosterior.load(FILES / "posterior_v2_float32.safetensors")
    posterior.metadata["notes"] = "\x1b[2Jwiped\n" + "long " * 100
    posterior.save(tmp_path / "p")
    assert main(["inspect", str(tmp_path / "p")]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\\x1b[2Jwiped\\n" in text
    assert max(map(len, text.splitlines()[1:])) < 130
