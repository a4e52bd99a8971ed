"""Invalid input to `fit`: a one-line error with who, what was expected and what came."""

import re

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

import cnf
from cnf import CheckpointError, FlowMatching, MaximumLikelihood
from cnf.objectives import Objective

X = torch.randn(100, 2, generator=torch.Generator().manual_seed(3))
BAD = X.clone()
BAD[7, 1], BAD[40, 0] = float("nan"), float("inf")
CONTEXT = X.sum(1, keepdim=True)


def refused(act, *words, kinds=(ValueError,)):
    """One line that has all the words (patterns)."""
    with pytest.raises(kinds) as raised:
        act()
    assert type(raised.value) in (*kinds, cnf.errors.UnknownNameError)
    message = str(raised.value)
    assert "\n" not in message.strip(), message
    for word in words:
        assert re.search(word, message), f"{word!r} is not in {message!r}"


DATA = {
    "wrong width": (torch.randn(100, 3), {}, [r"^fit", r"\(2,\)", r"\(3,\)"]),
    "images for points": (torch.randn(100, 1, 4, 4), {}, [r"^fit", r"\(2,\)", r"\(1, 4, 4\)"]),
    "a vector": (X[:, 0], {}, [r"^fit", r"\(N, D\)", r"\(100,\)"]),
    "a number": (torch.tensor(3.0), {}, [r"^fit", r"\(N, D\)"]),
    "NaN rows": (BAD, {}, [r"^fit", "2 of 100 rows", r"rows 7, 40"]),
    "NaN rows of an array": (BAD.numpy(), {}, [r"^fit", "rows 7, 40"]),
    "NaN rows of a dataset": (TensorDataset(BAD), {}, [r"fit", "NaN", "rows"]),
    "NaN rows of batches": ([X[:16], BAD[:16]], {}, ["^fit: batch 1: ", r"\(rows 7\)"]),
    "NaN rows of batches of Batches": (
        [cnf.Batch(X[:16]), cnf.Batch(BAD[:16])],
        {},
        ["^fit: batch 1: expected x to be finite", r"1 of 16 rows \(rows 7\)"],
    ),
    "infinite contexts of a Batch": (
        [cnf.Batch(X[:16], context=CONTEXT[:16] / 0)],
        {},
        ["^fit", "context to be finite"],
    ),
    "NaN rows in a Batch to validate on": (
        X,
        {"validation": cnf.Batch(BAD)},
        ["^fit", "validation to be finite", "rows 7, 40"],
    ),
    "no rows": (X[:0], {}, [r"^fit", r"\(0, 2\)"]),
    "an empty dataset": (TensorDataset(X[:0]), {}, [r"^fit", "got 0"]),
    "one row": (X[:1], {}, [r"^fit", "two rows", r"\(1, 2\)"]),
    "fewer rows than a batch": (X[:10], {}, [r"batch_size=16", "got 9", "lower batch_size"]),
    "integers": (torch.arange(200).reshape(100, 2), {}, ["float", "int64"]),
    "an iterator": (iter([X]), {}, [r"^fit", "iterable", "iterator"]),
    "an empty iterable": ([], {}, [r"^fit", "empty"]),
    "batches of another width": ([X[:16], torch.randn(16, 3)], {}, [r"\(2,\)|\*, 2", "3"]),
    "batches of three parts": ([(X[:16], X[:16], X[:16])], {}, [r"^fit", "3 parts"]),
    "no data for flow matching": (None, {}, ["data"]),
    "too few rows of context": (X, {"context": CONTEXT[:50]}, [r"^fit", "100", "50"]),
    "NaN in the context": (X, {"context": BAD}, [r"^fit", "context", "rows 7, 40"]),
    "NaN in validation": (X, {"validation": BAD}, ["validation", "NaN"]),
    "validation of another width": (X, {"validation": torch.randn(9, 3)}, ["3"]),
    "context for a flow without": (X, {"context": CONTEXT}, ["context"]),
    "context beside a toy": (cnf.data.toy("moons"), {"context": CONTEXT}, ["context"]),
    "context beside a dataset": (TensorDataset(X), {"context": CONTEXT}, ["context"]),
}


@pytest.mark.parametrize("objective", [FlowMatching(), MaximumLikelihood()])
@pytest.mark.parametrize("kind", DATA)
def test_unusable_data_are_refused_with_a_one_line_message(kind, objective, small, config):
    data, options, words = DATA[kind]
    refused(lambda: cnf.fit(small(), objective, data, config(), **options), *words)


@pytest.mark.parametrize("objective", [FlowMatching(), MaximumLikelihood()])
@pytest.mark.parametrize("validations", [0, 2])
@pytest.mark.parametrize("context", [None, torch.randn(100, 3)])
def test_error_names_missing_context_or_context_of_another_size(
    context, validations, objective, small, config
):
    settings = config(validations=validations)

    def act():
        return cnf.fit(small(context=2), objective, X, settings, context=context)

    refused(act, "context", r"\(\*, 2\)|2", "None" if context is None else "3")


class Weighted(Dataset):
    """Rows of which one has a weight that is negative."""

    def __len__(self):
        return len(X)

    def __getitem__(self, row):
        return {"x": X[row], "weight": torch.tensor(-1.0 if row == 63 else 1.0)}


@pytest.mark.parametrize(
    "data, words",
    [(TensorDataset(BAD), r"\(rows 7, 40\)"), (Weighted(), "got -1 in row 63")],
    ids=["NaN", "weight"],
)
def test_error_names_rows_of_a_dataset_by_their_index(data, words, small, config):
    refused(lambda: cnf.fit(small(), FlowMatching(), data, config(validations=0)), words)


def test_error_names_a_batch_by_its_position_in_the_epoch(small, config):
    passes = iter([[X[:16]] * 2, [X[:16]] * 2, [X[:16], BAD[:16]]])  # the first for its head

    class Batches:
        def __iter__(self):
            return iter(next(passes))

    refused(
        lambda: cnf.fit(small(), FlowMatching(), Batches(), config(validations=0)),
        r"^fit: batch 1 of pass 2: expected x to be finite.*\(rows 7\)",
    )


ARGUMENTS = {
    "a name for a flow": (("realnvp", "flow-matching", X), ["got 'realnvp'; build one"]),
    "no objective": (
        (None, None, X),
        ["^fit: expected objective to be one of .*maximum-likelihood", "got None"],
    ),
    "data before the objective": ((None, X, "moons"), ["expected objective", "got a Tensor"]),
    "another class": ((None, dict, X), ["objective", "got <class 'dict'>"]),
    "a number for settings": ((None, "flow-matching", X, 3), ["config", "got 3; write cnf"]),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments_of_wrong_type_are_named_in_the_error(kind, small, config):
    (module, *rest), words = ARGUMENTS[kind]
    refused(lambda: cnf.fit(module or small(), *rest), "^fit: ", *words, kinds=(TypeError,))


def test_config_may_be_a_mapping_and_objective_a_class(small, config, same):
    one, other = small(), small()
    cnf.fit(one, FlowMatching(), X, config(seed=5))
    settings = {"steps": 6, "batch_size": 16, "validation_rows": 50, "seed": 5}
    cnf.fit(other, FlowMatching, X, {**settings, "progress": False, "device": "cpu"})
    assert same(one, other)
    refused(lambda: cnf.fit(one, FlowMatching, X, {"stps": 3}), "'stps'.*mean 'steps'")


def test_flow_without_trainable_parameters_is_refused(small, config):
    flow = small().requires_grad_(False)
    refused(lambda: cnf.fit(flow, FlowMatching(), X, config()), r"fit: .*requires_grad_\(\)")


def test_sparse_tensor_is_refused(small, config):
    data = X.to_sparse()
    refused(lambda: cnf.fit(small(), FlowMatching(), data, config()), r"sparse_coo.*to_dense\(\)")


def test_data_are_refused_before_the_module_is_changed(small, config, same):
    flow = small()
    with pytest.raises(ValueError):
        cnf.fit(flow, FlowMatching(), BAD, config())
    assert same(flow, small())


SETTINGS = {
    "negative steps": ({"steps": -1}, ["steps > 0", "-1"]),
    "zero steps": ({"steps": 0}, ["steps > 0", "0"]),
    "endless steps": ({"steps": float("inf")}, ["steps to be a whole number", "inf"]),
    "NaN steps": ({"steps": float("nan")}, ["steps to be a whole number", "nan"]),
    "NaN decay of the weights": ({"weight_decay": float("nan")}, ["weight_decay >= 0", "nan"]),
    "negative seconds": ({"seconds": -2.5}, ["seconds > 0", r"-2\.5"]),
    "zero seconds": ({"seconds": 0.0}, ["seconds > 0"]),
    "seconds without end": ({"seconds": float("inf")}, ["seconds"]),
    "both budgets": ({"seconds": 3.0, "steps": 2}, ["not both", "steps=2", r"seconds=3\.0"]),
    "unknown optimizer": ({"optimizer": "sgdd"}, ["optimizer", "'adam', 'adamw'", "'sgdd'"]),
    "unknown schedule": ({"schedule": "linear"}, ["schedule", "'cosine'", "'linear'"]),
    "no batch": ({"batch_size": 0}, ["batch_size > 0"]),
    "no learning rate": ({"lr": 0.0}, ["lr > 0"]),
    "NaN learning rate": ({"lr": float("nan")}, ["lr > 0", "nan"]),
    "negative clip": ({"clip": -1.0}, ["clip > 0"]),
    "warm-up too long": ({"warmup": 1.0}, ["warmup < 1", r"1\.0"]),
    "ema of one": ({"ema": 1.0}, ["ema < 1"]),
    "negative ema": ({"ema": -0.1}, ["ema"]),
    "negative weight decay": ({"weight_decay": -1.0}, ["weight_decay >= 0"]),
    "negative validations": ({"validations": -1}, ["validations >= 0"]),
    "no patience": ({"patience": 0}, ["patience > 0"]),
    "text for a seed": ({"seed": "a"}, ["seed to be a whole number, got 'a'"]),
    "no seed": ({"seed": None}, ["seed to be given, got None"]),
    "a switch for a count": ({"steps": True}, ["steps to be a whole number, got True"]),
    "a list for a rate": ({"lr": [1]}, [r"lr to be a number, got \[1\]"]),
    "a number for a folder": ({"folder": 3}, ["folder to be a path, got 3"]),
    "a number for a strategy": ({"strategy": 3}, ["strategy to be a name", "'ddp'", "got 3"]),
    "unknown device": ({"device": "cuda:0"}, ["device", "'cuda', 'mps'", "got 'cuda:0'"]),
    "resume without a folder": ({"resume": True}, ["resume", "folder"]),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_invalid_settings_are_refused_with_a_one_line_message(kind):
    settings, words = SETTINGS[kind]
    refused(lambda: cnf.TrainConfig(**settings), "^TrainConfig", *words)


def test_misspelt_setting_is_refused():
    refused(lambda: cnf.TrainConfig(stpes=3), "stpes", kinds=(TypeError,))  # pyright: ignore


def test_default_budget_is_one_minute():
    assert cnf.TrainConfig().seconds == 60.0 and cnf.TrainConfig(steps=3).seconds is None


def test_misspelt_options_of_objectives_and_models_are_refused(small):
    refused(lambda: FlowMatching(coupling="indpendent"), "coupling", "independent")
    refused(lambda: FlowMatching(path="liner"), "path", "linear")
    refused(lambda: MaximumLikelihood(divergence="hutch"), "divergence", "hutchinson")
    refused(lambda: MaximumLikelihood(penalties={"kinetics": 0.1}), "kinetic")
    refused(lambda: small("cnf", hiden=(3,)), "hiden", "hidden")
    refused(lambda: small("cmf"), "cmf", "cnf")


def test_error_for_flow_matching_of_a_discrete_flow_names_another_objective(small, config):

    def act():
        return cnf.fit(small("realnvp"), FlowMatching(), X, config())

    refused(act, "FlowMatching", r"MaximumLikelihood\(\)", kinds=(TypeError,))


def test_likelihood_of_a_module_that_is_not_a_flow_is_refused(config):

    def act():
        return cnf.fit(torch.nn.Linear(2, 2), MaximumLikelihood(), X, config())

    refused(act, "MaximumLikelihood", "cnf.Flow", "Linear", kinds=(TypeError,))


@pytest.mark.parametrize(
    "setting, words",
    [
        ({"device": "gpu0"}, ["gpu0"]),
        ({"strategy": "dpp"}, ["dpp"]),
        ({"precision": "15"}, ["15", "precision|Precision"]),
        ({"strategy": "ddp_spawn", "devices": 2}, ["ddp_spawn"]),
    ],
)
def test_unknown_engine_settings_are_refused_before_a_folder_is_made(
    setting, words, small, config, tmp_path
):
    def act():
        cnf.fit(small(), FlowMatching(), X, config(folder=tmp_path / "run", **setting))

    refused(act, *words)
    assert not (tmp_path / "run").exists()


def test_resume_of_a_missing_folder_is_refused(small, config, tmp_path):
    settings = config(folder=tmp_path / "run", resume=True)
    refused(lambda: cnf.fit(small(), FlowMatching(), X, settings), "no run to resume", "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(cnf.CheckpointError, match="no checkpoint state.pt to resume in .*run"):
        cnf.fit(small(), FlowMatching(), X, settings)
    assert list((tmp_path / "run").iterdir()) == []


def test_resume_of_a_folder_without_a_checkpoint_is_refused(small, config, tmp_path):
    settings = config(folder=tmp_path, resume=True)

    def act():
        return cnf.fit(small(), FlowMatching(), X, settings)

    refused(act, "state.pt", str(tmp_path), kinds=(CheckpointError,))


@pytest.mark.parametrize("other", [("cnf", {"hidden": (9,)}), ("ffjord", {}), ("realnvp", {})])
def test_resume_with_another_model_is_refused_with_a_one_line_message(
    other, small, config, tmp_path
):
    cnf.fit(small(), MaximumLikelihood(), X, config(folder=tmp_path / "run"))
    name, options = other
    settings = config(folder=tmp_path / "run", resume=True)

    def act():
        return cnf.fit(small(name, **options), MaximumLikelihood(), X, settings)

    refused(act, "another run", str(tmp_path), kinds=(CheckpointError,))


def test_resume_with_another_seed_is_refused(small, config, tmp_path):
    cnf.fit(small(), FlowMatching(), X, config(folder=tmp_path / "run", seed=1))
    settings = config(folder=tmp_path / "run", seed=2, resume=True)

    def act():
        return cnf.fit(small(), FlowMatching(), X, settings)

    refused(act, "seed", kinds=(CheckpointError, ValueError))


def test_objective_without_defaults_trains_with_a_folder(config, tmp_path):
    from dataclasses import dataclass

    @dataclass
    class Power(Objective):
        exponent: float

        def prepare(self, module, batch, generator=None):
            return batch

        def __call__(self, module, batch, generator=None):
            return cnf.Loss(module(batch.x).abs().pow(self.exponent).mean(), {})

    settings = config(folder=tmp_path / "run")
    assert cnf.fit(torch.nn.Linear(2, 2), Power(3.0), X, settings).steps == 6


def test_data_outside_of_the_logits_interval_are_refused_before_training():
    def fit(x, validation=None, **options):
        flow = cnf.models.build("realnvp", dim=2, layers=1, hidden=(4,), **options)
        config = cnf.TrainConfig(steps=2, batch_size=20, validations=0, progress=False)
        cnf.fit(flow, MaximumLikelihood(), x, config, validation=validation)

    inside = X.sigmoid()
    fit(inside, preprocess=["logit", "standardize"])
    beyond = inside.clone()
    beyond[3] = 3.0
    words = "1 of 100 rows are outside of the interval from -1e-06 to 1 that the logit .* to 3:"
    for preprocess in ("logit", ["logit", "standardize"]):
        refused(lambda p=preprocess: fit(beyond, preprocess=p), words)
        held_out = words.replace("rows", "held-out rows")
        refused(lambda p=preprocess: fit(inside, beyond, preprocess=p), held_out)
    logit = {"name": "logit", "levels": 4}
    fit(beyond, preprocess=[logit, "standardize"])
