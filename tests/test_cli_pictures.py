"""The command line on tiny pictures: every command, and what it says of them."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import cnf
from cnf import cli
from cnf.data import Columns, load

FIT = ["--batch-size", "20", "--device", "cpu", "--no-progress", "--validation-rows", "20"]
GLOW = ["--model", "glow", "--options.layers", "1", "--options.hidden", "[4,4]", *FIT]


@pytest.fixture
def call(capsys):
    """(arguments) → (exit code, standard output, standard error)."""

    def run(*arguments):
        capsys.readouterr()
        code = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, " ".join(said.out.split()), said.err

    return run


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """120 pictures of 4×4 in three shades, with their labels."""
    draw, path = np.random.default_rng(0), tmp_path_factory.mktemp("pictures") / "tiny.npz"
    labels = np.arange(120) % 3
    pixels = draw.integers(0, 60, (120, 4, 4)) + 60 * labels[:, None, None]
    np.savez(path, x=pixels.astype(np.uint8), y=labels)
    return path


def trained(folder, file, *options):
    model = [] if "--model" in options else GLOW
    cli.main(["train", str(file), *model, *options, "--steps", "2", "--folder", str(folder)])
    return folder


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain") / "run", file)


@pytest.fixture(scope="module")
def conditional(file, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("labels") / "run", file, "--context", "labels")


def test_model_of_pictures_has_their_levels_and_standardized_logits(run):
    flow = cnf.load(run)
    assert flow.event_shape == (1, 4, 4)
    assert repr(flow.dequantization) == "UniformDequantization(256 levels)"
    standardize, logit = flow.preprocess.transforms
    assert standardize.fitted
    low, high = logit.support
    assert low == pytest.approx(-256e-6, rel=1e-5) and high == pytest.approx(256 - low)


def test_options_of_the_command_win_over_those_of_the_pictures(file, tmp_path, call):
    own = ["--options.preprocess", "{name: logit, alpha: 0.05}"]
    own += ["--options.dequantization", "{name: variational, layers: 2, hidden: [3, 3]}"]
    code, said, errors = call(
        "train", file, *GLOW, *own, "--steps", "2", "--folder", tmp_path / "run"
    )
    assert (code, errors) == (0, "") and "bits/dim" in said
    options = cnf.load(tmp_path / "run").spec["options"]
    assert options["preprocess"] == {"name": "logit", "alpha": 0.05}
    assert options["dequantization"]["name"] == "variational"


def test_evaluate_says_bits_per_dim_of_the_pictures_that_were_held_out(run, file, call):
    code, said, errors = call("evaluate", run, "--draws", "3")
    assert (code, errors) == (0, "")
    assert "Scored on 12 pictures that training never saw" in said
    assert "3 draws of the noise each" in said
    scores = json.loads((run / "evaluation.json").read_text())
    assert scores["bits_per_dim"] == pytest.approx(scores["nll"] / (16 * math.log(2)))
    _, held_out = load(file).split(0.1)
    flow, draws = cnf.load(run), torch.Generator().manual_seed(1)
    expected = cnf.metrics.bits_per_dim(flow, held_out.x, draws=400, generator=draws)
    assert scores["bits_per_dim"] == pytest.approx(expected.value, abs=0.3)  # of three draws
    assert (
        f"{cnf.metrics.Estimate(scores['bits_per_dim'], scores['bits_per_dim_error'])} bits/dim"
        in said
    )


def test_samples_are_a_grid_or_whole_pixels(run, call, tmp_path):
    assert call("sample", run, tmp_path / "x.png", "-n", 6)[:2] == (
        0, f"6 pictures in {tmp_path / 'x.png'}",
    )  # fmt: skip
    with Image.open(tmp_path / "x.png") as grid:
        assert grid.size == (3 * 5 - 1, 2 * 5 - 1)
    for name in ("x.npy", "x.npz"):
        assert call("sample", run, tmp_path / name, "-n", 6)[0] == 0
        assert load(tmp_path / name).x.shape == (6, 1, 4, 4)
    code, _, errors = call("sample", run, tmp_path / "x.csv")
    assert code == 2 and "expected a .png, .npy or .npz file, got x.csv" in errors


def test_labels_are_a_context_of_every_command(conditional, file, call, tmp_path):
    assert cnf.load(conditional).context_dim == 3
    code, _, errors = call("sample", conditional, tmp_path / "x.npy")
    assert code == 2 and "conditioned on labels; give --context" in errors
    assert call("sample", conditional, tmp_path / "x.npy", "-n", 4, "--context", "2")[0] == 0
    code, _, errors = call("sample", conditional, tmp_path / "y.npy", "--context", "7")
    assert code == 2 and "unknown labels '7'; known: 0, 1, 2" in errors
    code, said, _ = call("evaluate", conditional)
    assert code == 0 and "bits/dim" in said
    code, said, _ = call("check", conditional)
    assert code == 0 and "64 rows of tiny, with their contexts" in said


def test_pictures_of_fewer_classes_are_read_as_the_runs_were(conditional, call, tmp_path):
    np.savez(tmp_path / "two.npz", x=np.zeros((30, 4, 4), np.uint8), y=np.arange(30) % 2)
    code, said, _ = call("evaluate", conditional, "--data", tmp_path / "two.npz")
    assert code == 0 and "30 pictures of two" in said


def test_conditional_run_repeats_from_its_config(conditional, call, tmp_path):
    config = conditional / "config.yaml"
    assert call("train", "--config", config, "--folder", tmp_path / "again")[0] == 0
    place = "checkpoints/flow.safetensors"
    assert (tmp_path / "again" / place).read_bytes() == (conditional / place).read_bytes()


def test_check_passes_and_says_what_it_cannot(run, file, call):
    code, said, _ = call("check", run, "--data", file)
    assert code == 0
    assert "dequantization was left out" in said
    assert "a grid is out of reach in more than 2 dimensions" in said


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_plot_draws_grids_and_says_what_is_left_out(conditional, call):
    code, said, _ = call("plot", conditional)
    assert code == 0
    assert "drawn of two dimensions only; these have 16" in said
    with Image.open(conditional / "figures" / "samples.png") as image:
        assert np.asarray(image.convert("L")).std() > 20


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:fit. the held-out NLL ends:UserWarning")
def test_compare_races_models_of_pictures_and_leaves_out_the_others(file, call, tmp_path):
    code, said, errors = call(
        "compare", file, "--steps", 1, "--contestants", "glow,maf", "--folder", tmp_path / "race",
        "--no-progress", "--w2-points", 20,
    )  # fmt: skip
    assert code == 0, errors
    assert "/dim" in said and "pixels from 0 to 1" in said
    assert "maf: models vectors, got images of shape (1, 4, 4); models of images are" in said
    assert "drawn of two dimensions only; these have 16" in said
    page = (tmp_path / "race" / "report.html").read_text()
    assert "as many samples of each" in page and "Bits/dim" in page
    assert "Nearest pictures" in page and "Between two pictures" in page


def test_continuous_flow_of_pictures_is_scored_by_an_estimate_and_says_so(file, call, tmp_path):
    solver = ["--options.solver", "{method: rk4, steps: 2}"]
    model = ["--model", "cnf", "--options.hidden", "[4]", *solver, *FIT]
    run = trained(tmp_path / "run", file, *model)
    code, said, _ = call("evaluate", run)
    assert code == 0 and "with traces estimated by one probe" in said
    code, _, errors = call("evaluate", run, "--draws", "2")
    assert code == 2 and "expected one draw of the noise for a continuous flow" in errors


def test_other_columns_of_pictures_are_refused_in_a_line(file, call):
    code, _, errors = call("train", file, *GLOW, "--context", "species")
    assert code == 2 and "of pictures only the labels can be a context" in errors
    assert len(errors.splitlines()) == 1
    assert Columns(context=["labels"]) != Columns()


def test_unet_is_trained_by_flow_matching_unless_told(file, tmp_path):
    model = ["--model", "unet", "--options.width", "4", "--options.scales", "[1]"]
    folder = trained(tmp_path / "run", file, *model, "--options.blocks", "1", *FIT)
    assert cli.read_config(folder)["objective"] == "flow-matching"
