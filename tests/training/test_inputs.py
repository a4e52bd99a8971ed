"""Inputs that users give to `fit`: they are accepted, or an error says what to write."""

import numpy as np
import pandas
import pyarrow
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import cnf
from cnf import FlowMatching, MaximumLikelihood

ROWS = torch.randn(100, 2, generator=torch.Generator().manual_seed(3))
FRAME = pandas.DataFrame(ROWS.numpy(), columns=["x", "y"])
LABELS = torch.arange(100) % 3
CONTEXT = torch.nn.functional.one_hot(LABELS, 3).float()


class DictRows(Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, row):
        return {"x": ROWS[row], "context": CONTEXT[row], "weight": 1.0 + row % 2}


@pytest.mark.parametrize(
    "data",
    [
        FRAME,
        pyarrow.table(FRAME),
        ROWS.tolist(),
        ROWS.numpy().astype(">f4"),
        ROWS.numpy()[::-1].copy()[::-1],
        ROWS.clone().requires_grad_(),
        {"x": ROWS.numpy()},
        cnf.data.Points(ROWS),
    ],
    ids=[
        "frame with a column x",
        "Arrow",
        "lists",
        "big-endian",
        "reversed",
        "graph",
        "dict",
        "Points",
    ],
)
def test_rows_of_any_type_train_like_a_tensor(data, small, config, same):
    one, other = small(), small()
    cnf.fit(one, FlowMatching(), ROWS, config())
    cnf.fit(other, FlowMatching(), data, config(), validation=None)
    assert same(one, other)


@pytest.mark.parametrize(
    ("context", "size"),
    [(CONTEXT, 3), (CONTEXT.long(), 3), (pandas.DataFrame(CONTEXT.numpy()), 3), (ROWS[:, 0], 1),
     (FRAME["x"], 1), (ROWS[:, 0].tolist(), 1)],
    ids=["one-hot", "integers", "frame", "(N,)", "series", "list"],
)  # fmt: skip
def test_contexts_of_any_type_train_like_a_tensor(context, size, small, config, same):
    one, other = (small("realnvp", context=size) for _ in range(2))
    tensor = {3: CONTEXT, 1: ROWS[:, :1]}[size]
    cnf.fit(one, MaximumLikelihood(), ROWS, config(), context=tensor)
    cnf.fit(other, MaximumLikelihood(), FRAME, config(), context=context)
    assert same(one, other)


def test_names_and_weights_follow_rows_and_batches(small, config, same):
    flows = [small("realnvp", context=3) for _ in range(2)]
    weight = 1.0 + torch.arange(100) % 2
    cnf.fit(flows[0], MaximumLikelihood(), DictRows(), config())
    cnf.fit(flows[1], MaximumLikelihood(), ROWS, config(), context=CONTEXT, weight=weight)
    assert same(*flows)
    loader = DataLoader(DictRows(), batch_size=33)  # its last batch has one row
    cnf.fit(small("realnvp", context=3), MaximumLikelihood(), loader, config())


def test_points_bring_their_context_and_weight(small, config, same):
    weight = torch.linspace(1, 2, 100)
    one, other = (small("realnvp", context=3) for _ in range(2))
    points = cnf.data.Points(ROWS, context=CONTEXT, weight=weight)
    cnf.fit(one, MaximumLikelihood(), points, config())
    cnf.fit(other, MaximumLikelihood(), ROWS, config(), context=CONTEXT, weight=weight)
    assert same(one, other)


def test_torch_distributions_are_sampled_at_every_step(small, config):
    normal = torch.distributions.Normal(torch.tensor([3.0, -2.0]), torch.tensor([0.5, 2.0]))
    settings = config(steps=100, batch_size=256, lr=1e-2, validation_rows=10_000, validations=1)
    flow = small("realnvp")
    history = cnf.fit(flow, MaximumLikelihood(), normal, settings)
    entropy = normal.entropy().sum().item()
    assert history.column("val_nll")[-1] == pytest.approx(entropy, abs=0.1)
    student = small("realnvp")
    history = cnf.fit(student, MaximumLikelihood(), flow, settings)
    assert history.column("val_nll")[-1] == pytest.approx(entropy, abs=0.2)


def test_data_and_objectives_may_be_given_by_name_or_file(small, config, same, tmp_path):
    path = tmp_path / "mine.npy"
    np.save(path, ROWS)
    pairs = [(FlowMatching(), cnf.data.toy("moons"), "moons"), (FlowMatching(), ROWS, str(path)),
             (FlowMatching(), ROWS, path)]  # fmt: skip
    for objective, data, name in pairs:
        one, other = small(), small()
        cnf.fit(one, objective, data, config())
        cnf.fit(other, "flow-matching", name, config())
        assert same(one, other)
    with pytest.raises(ValueError, match="Did you mean 'moons'"):
        cnf.fit(small(), "flow-matching", "mons", config())
    with pytest.raises(ValueError, match="Did you mean 'flow-matching'"):
        cnf.fit(small(), "flow-maching", "moons", config())


def test_a_generator_function_is_called_for_each_pass(small, config, same):
    def batches():
        yield from ROWS[:48].split(16)

    one, other = small(), small()
    cnf.fit(one, FlowMatching(), batches, config())
    cnf.fit(other, FlowMatching(), list(ROWS[:48].split(16)), config())
    assert same(one, other)


@pytest.mark.parametrize(
    "validation", [FRAME, {"x": FRAME, "weight": [1.0] * 100}, ROWS.tolist(), "moons"]
)
def test_validation_data_may_have_any_type(validation, small, config):
    assert cnf.fit(small(), "flow-matching", ROWS, config(), validation=validation).column(
        "val_nll"
    )


WRONG = {
    "labels": (
        ROWS,
        {"context": LABELS},
        r"one_hot\(torch.as_tensor\(labels\), classes\).float\(\)",
    ),
    "single rows": (list(ROWS), {}, r"shape \(N, D\), got \(2,\); of single rows .*DataLoader\("),
    "loader of rows": (DataLoader(TensorDataset(ROWS), batch_size=None), {}, "DataLoader"),
    "batches of one row": (list(ROWS.split(1)), {}, "two rows or more.*batch_size=256"),
    "other names": ([{"data": ROWS}], {}, "a mapping with x and any of context, .*, got data"),
    "unknown names": ({"x": ROWS, "labels": LABELS}, {}, "a mapping with x .*, got x, labels"),
    "text": (FRAME.assign(town="Ulm"), {}, "text in the columns town"),
    "missing": (FRAME.assign(y=np.nan), {}, "finite.*100 of 100 rows"),
    "counts": (FRAME.astype(int), {}, r"floating dtype.*astype\(float\)"),
    "integer batches": (list(ROWS.long().split(16)), {}, r"floating dtype, got torch.int64"),
    "a generator": (
        (b for b in [ROWS]),
        {},
        "an iterator; give a list of batches, or the generator",
    ),
    "one event": (torch.distributions.Normal(0.0, 1.0), {}, r"\(2,\), those of data .* \(\)"),
    "wrong validation": (
        ROWS,
        {"validation": ROWS[:, :1]},
        r"\(2,\), those of validation .* \(1,\)",
    ),
    "two contexts": ({"x": ROWS, "context": CONTEXT}, {"context": CONTEXT}, "their own context"),
    "column of events": (ROWS[:, None], {}, r"\(2,\), those of data .*\(1, 2\)"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_error_for_unsupported_data_says_what_to_write(kind, small, config):
    data, options, message = WRONG[kind]
    with pytest.raises(ValueError, match=f"^fit: .*{message}"):
        cnf.fit(small(), FlowMatching(), data, config(), **options)


def test_batch_may_contain_rows_of_weight_0(small, config):
    batches = [{"x": ROWS[:16], "weight": torch.zeros(16)}, {"x": ROWS, "weight": torch.ones(100)}]
    history = cnf.fit(small(), FlowMatching(), batches, config())
    assert history.steps == 6 and history.skipped == 0


def test_error_for_log_prob_of_an_array_says_what_to_write(small):
    with pytest.raises(ValueError, match=r"got ndarray; write torch.as_tensor\(x\)$"):
        small().log_prob(ROWS.numpy())


def test_points_of_a_data_frame_may_be_a_base(small):
    flow = cnf.Flow(FRAME, small().transform)
    assert (ROWS == flow.base.sample(())).all(1).any()


def test_tuple_is_x_with_context_and_list_is_batches(small, config, same):
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    c = x.sum(1, keepdim=True)
    flows = [small("realnvp", context=1) for _ in range(2)]
    cnf.fit(flows[0], MaximumLikelihood(), (x, c), config())
    cnf.fit(flows[1], MaximumLikelihood(), x, config(), context=c)
    assert same(*flows)
    with pytest.raises(ValueError, match="unconditional, got a context"):
        cnf.fit(small("realnvp"), MaximumLikelihood(), (x, x + 50), config())
    with pytest.raises(ValueError, match="expected 64 rows of context, got 10"):
        cnf.fit(small("realnvp"), MaximumLikelihood(), (x, x[:10]), config())
    with pytest.raises(ValueError, match=r"a tuple to be \(x, context\), got 3 parts"):
        cnf.fit(small("realnvp"), MaximumLikelihood(), (x, x, x), config())
    history = cnf.fit(small("realnvp"), MaximumLikelihood(), x, config(), validation=[x, x])
    assert "val_nll" in repr(history) and len(repr(history)) < 80


@pytest.mark.parametrize("name", ["Poisson", "Dirichlet"])
def test_distributions_without_a_density_are_refused_as_data(name, small, config):
    made = getattr(torch.distributions, name)(torch.ones(2))
    made = torch.distributions.Independent(made, 1) if name == "Poisson" else made
    with pytest.raises(ValueError, match=f"fit: expected data to .*, got a {name}"):
        cnf.fit(small("realnvp"), MaximumLikelihood(), made, config())
    with pytest.raises(ValueError, match=f"every contestant failed: .* got a {name}"):
        cnf.compare(made, ["realnvp"], steps=2, progress=False, w2_points=20, test_points=40)
