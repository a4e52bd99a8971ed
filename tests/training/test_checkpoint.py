"""Checkpoints: saving and loading, and refusal of broken or foreign files."""

import contextlib
import errno
import json
import os
import pickle
import re
import resource
from pathlib import Path

import pytest
import safetensors.torch
import torch

import cnf
from cnf.training import load, save
from cnf.training.checkpoint import load_state, save_state

OLD = Path(__file__).parent / "before_hashes"  # written when files carried no hash
MODELS = ["cnf", "ffjord", "realnvp"]


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def refusal(read, *arguments, **options):
    """The one line that a CheckpointError says."""
    with pytest.raises(cnf.CheckpointError) as raised:
        read(*arguments, **options)
    message = str(raised.value)
    assert "\n" not in message.strip(), message
    if message.startswith("save: "):
        return message
    # Who, what was expected, what came, what to do.
    assert re.match(r"(load|resume): ", message), message
    assert re.search(r"expected .*got |do not fit|did you mean", message), message
    assert re.search(r"; .*\b(take|build|write|name|give|looked|did|data|train|fill)\b", message)
    return message


@pytest.fixture
def written(small, tmp_path):
    return save(small(), tmp_path / "flow.safetensors")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_load_gives_the_same_log_prob(name, dtype, small, points, tmp_path):
    flow = small(name).to(dtype)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1)
    flow.preprocess and flow.preprocess.fit(points.to(dtype))
    read = load(save(flow, tmp_path / "flow.safetensors"))
    x = points.to(dtype)
    assert torch.equal(read.log_prob(x), flow.log_prob(x))
    assert read.spec == flow.spec


@pytest.mark.parametrize("name", MODELS)
def test_conditional_flow_is_rebuilt_from_its_checkpoint(name, small, points, tmp_path):
    flow = small(name, context=3)
    context = torch.randn(100, 3)
    read = load(save(flow, tmp_path / "flow.safetensors"))
    assert torch.equal(read.log_prob(points, context), flow.log_prob(points, context))


def test_flow_saved_before_its_model_standardized_loads_unchanged(points, tmp_path):
    flow = cnf.models.build("ffjord", dim=2, hidden=(8,), preprocess=None)
    del flow.spec["options"]["preprocess"]  # what the default was
    read = load(save(flow, tmp_path / "old.safetensors"))
    assert read.preprocess is None
    assert torch.equal(read.log_prob(points), flow.log_prob(points))
    again = load(save(read, tmp_path / "new.safetensors"))
    assert again.preprocess is None and again.spec["options"]["preprocess"] is None


def test_hand_built_flow_requires_into(small, points, tmp_path):
    built = small("realnvp")
    by_hand = cnf.Flow(None, built.transform, event_shape=(2,))
    path = save(by_hand, tmp_path / "flow.safetensors")
    assert "into=" in refusal(load, path)
    into = cnf.Flow(None, small("realnvp").transform, event_shape=(2,))
    assert load(path, into=into) is into
    assert torch.equal(into.log_prob(points), by_hand.log_prob(points))


@pytest.mark.parametrize(
    "act, words",
    [
        (lambda flow: cnf.save("a.safetensors", flow), r"save: .* got str; the order is save\(f"),
        (lambda flow: cnf.save(flow.state_dict(), "a"), "save: expected a flow.* OrderedDict"),
        (lambda flow: cnf.save(flow, None), "save: expected the path of a file, got NoneType"),
        (lambda flow: cnf.load(flow), "load: expected the path of a file, got Flow"),
        (lambda flow: cnf.load("a", "cpu"), r"load: expected into to be the flow .* got str"),
    ],
)
def test_arguments_of_wrong_type_are_named_in_the_error(act, words, small):
    with pytest.raises(TypeError, match=words):
        act(small())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_error_names_a_missing_device(written, small, points, config):
    with pytest.raises(ValueError, match="load: expected a device that is there, got 'cuda:0'"):
        load(written, device="cuda:0")
    with pytest.raises(ValueError, match="fit: expected a device that is there, got 'cuda'"):
        cnf.fit(small(), "flow-matching", points, config(device="cuda"))


def test_loading_into_another_flow_is_refused_with_a_one_line_message(small, written):
    message = refusal(load, written, into=small("realnvp"))
    assert "do not fit" in message and str(written) in message


def test_error_names_missing_file_and_empty_folder(tmp_path):
    assert "nowhere" in refusal(load, tmp_path / "nowhere")
    assert "flow.safetensors" in refusal(load, tmp_path)


def test_truncated_checkpoint_is_refused(written, tmp_path):
    data = written.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in (0, 1, 7, 8, 9, 50, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:length])
        assert str(cut) in refusal(load, cut)


@pytest.mark.parametrize("data", [b"not a checkpoint", b"\xff" * 64, b"\x00" * 64, b"{}" * 40])
def test_file_of_another_format_is_refused(data, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    assert str(path) in refusal(load, path)


def test_another_programs_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"w": torch.ones(2)}, path, metadata=metadata)
        assert "not written by cnf" in refusal(load, path)


SPECS = {
    "no json": "{",
    "a list": "[1]",
    "no options": json.dumps({"model": "cnf"}),
    "unknown model": json.dumps({"model": "os.system", "options": {"dim": 2}}),
    "unknown option": json.dumps({"model": "cnf", "options": {"dim": 2, "evil": 1}}),
    "wrong kind of option": json.dumps({"model": "cnf", "options": {"dim": "two"}}),
    "negative size": json.dumps({"model": "cnf", "options": {"dim": -2}}),
    "options are a list": json.dumps({"model": "cnf", "options": [1, 2]}),
    "hidden is a number": json.dumps({"model": "cnf", "options": {"dim": 2, "hidden": 3}}),
    "solver is a word": json.dumps({"model": "cnf", "options": {"dim": 2, "solver": "x"}}),
}


@pytest.mark.parametrize("kind", SPECS)
def test_broken_recipe_is_refused(kind, tmp_path):
    path = tmp_path / "x.safetensors"
    metadata = {"format": "cnf-flow-1", "spec": SPECS[kind]}
    safetensors.torch.save_file({"w": torch.ones(2)}, path, metadata=metadata)
    assert str(path) in refusal(load, path)


def test_missing_recipe_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, path, metadata={"format": "cnf-flow-1"})
    assert str(path) in refusal(load, path)


def write_pickle(bomb, path):
    path.write_bytes(pickle.dumps(bomb, 2))


def write_torch(bomb, path):
    torch.save({"learner": bomb}, path)


@pytest.mark.parametrize("write", [write_pickle, write_torch])
@pytest.mark.parametrize("name, read", [("x.safetensors", load), ("state.pt", load_state)])
def test_malicious_pickle_runs_no_code(name, read, write, tmp_path):
    mark, path = tmp_path / "exploded", tmp_path / name
    write(Bomb(mark), path)
    message = refusal(read, path)
    assert str(path) in message
    assert "to `False`" not in message  # torch's advice: run the code after all
    assert not mark.exists()
    with contextlib.suppress(RuntimeError, TypeError), open(path, "rb") as file:
        torch.load(file, weights_only=False)
    assert mark.exists()  # it was a live one


def test_truncated_state_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    save_state({"learner": {"w": torch.ones(1000)}, "records": [{"step": 1}]}, path)
    data = path.read_bytes()
    for length in (0, 1, 10, 100, len(data) // 2, len(data) - 10):
        path.write_bytes(data[:length])
        assert str(path) in refusal(load_state, path)


@pytest.mark.parametrize("data", [b"not a state", b"PK\x03\x04" + bytes(90), b"\x80\x02" * 9])
def test_state_of_another_program_is_refused(data, tmp_path):
    path = tmp_path / "state.pt"
    path.write_bytes(data)
    assert str(path) in refusal(load_state, path)


@pytest.fixture
def small_disk():
    """(bytes) → no file grows beyond so many, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_does_not_change_the_old_checkpoint(small, written, small_disk):
    old, other = written.read_bytes(), small()
    torch.nn.init.ones_(next(other.parameters()))
    small_disk(len(old) // 2)
    message = refusal(save, other, written)
    assert "cannot write" in message and str(written) in message
    assert written.read_bytes() == old
    assert os.listdir(written.parent) == [written.name]


def test_full_disk_does_not_change_the_old_state(tmp_path, small_disk):
    path = tmp_path / "state.pt"
    save_state({"a": 1}, path)
    old = path.read_bytes()
    small_disk(1000)
    assert "cannot write" in refusal(save_state, {"a": torch.ones(1000)}, path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["state.pt"]


def test_refused_replacement_leaves_no_temporary_file(small, written, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    old = written.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", denied)
        assert "Permission denied" in refusal(save, small(), written)
    assert written.read_bytes() == old
    assert os.listdir(written.parent) == [written.name]


def test_path_under_a_file_is_refused(small, written):
    assert "cannot write" in refusal(save, small(), written / "flow.safetensors")


def test_shared_weights_are_saved(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module[1].weight = module[0].weight
    path = save(module, tmp_path / "tied.safetensors")
    read = safetensors.torch.load_file(path)
    assert torch.equal(read["1.weight"], read["0.weight"])


def flipped(data):
    """The bytes with one bit flipped, in each of the first hundred bytes and some of the rest."""
    for place in [*range(100), *range(100, len(data), 7)]:
        yield data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]


def test_every_flipped_bit_of_a_flow_file_is_refused(tmp_path):
    flow = cnf.models.build("realnvp", dim=2, layers=1, hidden=(2,), preprocess=None)
    path = save(flow, tmp_path / "flow.safetensors")
    for data in flipped(path.read_bytes()):
        path.write_bytes(data)
        assert str(path) in refusal(load, path)


def test_every_flipped_bit_of_a_state_file_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    save_state({"learner": {"w": torch.ones(3)}, "records": [{"step": 1}]}, path)
    for data in flipped(path.read_bytes()):
        path.write_bytes(data)
        assert str(path) in refusal(load_state, path)


def test_saving_twice_gives_identical_files(small, written, tmp_path):
    again = save(small(), tmp_path / "again.safetensors")
    assert again.read_bytes() == written.read_bytes()


def test_flow_file_without_hash_loads():
    flow = load(OLD)
    assert flow.spec["options"]["hidden"] == [2]
    weights = torch.cat([value.flatten() for value in flow.parameters()])
    assert weights.sum().item() == pytest.approx(-3.147118091583252, rel=1e-6)


def test_state_file_without_hash_loads():
    state = load_state(OLD)
    assert state["budget"]["step"] == 3 and len(state["records"]) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weight_is_named_on_saving_and_loading(value, small, tmp_path):
    flow, path = small("realnvp"), tmp_path / "x.safetensors"
    name, weight = list(flow.named_parameters())[3]
    torch.nn.init.constant_(weight, value)
    assert name in refusal(save, flow, path) and not path.exists()
    metadata = {"cnf-flow-1": json.dumps(flow.spec)}
    safetensors.torch.save_file(flow.state_dict(), path, metadata=metadata)
    assert name in refusal(load, path)


DAMAGED = {
    "deep JSON": {"cnf-flow-1": "[" * 100_000},
    "deep JSON, hashed": {"cnf-flow-2": "[" * 100_000},
    "no JSON": {"cnf-flow-2": "{"},
    "a list": {"cnf-flow-2": "[1]"},
    "no hash": {"cnf-flow-2": json.dumps({"spec": None})},
    "a hash that is a number": {"cnf-flow-2": json.dumps({"sha256": 3, "spec": None})},
    "an empty hash": {"cnf-flow-2": json.dumps({"sha256": "", "spec": None})},
    "another hash": {"cnf-flow-2": json.dumps({"sha256": "0" * 64, "spec": None})},
    **{f"{kind}, unhashed": {"cnf-flow-1": text} for kind, text in SPECS.items()},
    "options null": {"cnf-flow-1": '{"model": "cnf", "options": null}'},
    "model a list": {"cnf-flow-1": '{"model": [], "options": {"dim": 2}}'},
    "model null": {"cnf-flow-1": '{"model": null, "options": {"dim": 2}}'},
    "dim null": {"cnf-flow-1": '{"model": "cnf", "options": {"dim": null}}'},
    "dim a fraction": {"cnf-flow-1": '{"model": "realnvp", "options": {"dim": 2.5}}'},
    "huge": {"cnf-flow-1": '{"model": "realnvp", "options": {"dim": 2, "hidden": [1e30]}}'},
    "other weights": {"cnf-flow-1": '{"model": "realnvp", "options": {"dim": 2}}'},
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_header_is_refused(kind, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, path, metadata=DAMAGED[kind])
    assert str(path) in refusal(load, path)


@pytest.mark.parametrize("name, read", [("flow.safetensors", load), ("state.pt", load_state)])
def test_folder_in_place_of_the_file_is_refused(name, read, tmp_path):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert str(tmp_path) in refusal(read, tmp_path)
    assert str(tmp_path) in refusal(read, tmp_path / "checkpoints" / name)


@pytest.mark.parametrize("held", [3, [1], torch.ones(2), None, "x"])
def test_state_with_unexpected_contents_is_refused(held, tmp_path):
    path = tmp_path / "state.pt"
    save_state(held, path)
    assert type(held).__name__ in refusal(load_state, path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_error_for_a_file_of_torch_save_says_how_to_convert_it(suffix, small, tmp_path):
    path = tmp_path / f"weights{suffix}"
    torch.save(small().state_dict(), path)
    with pytest.raises(
        cnf.CheckpointError, match=r"got .*torch\.save.*load_state_dict.*cnf\.save"
    ):
        cnf.load(path)


def test_error_for_a_missing_file_lists_close_names_or_contents_of_the_folder(small, tmp_path):
    cnf.save(small(), tmp_path / "model.safetensors")
    with pytest.raises(cnf.CheckpointError, match=r"not there; did you mean .*/model.safetensors"):
        cnf.load(tmp_path / "modle.safetensors")
    with pytest.raises(cnf.CheckpointError, match="not there; looked from"):
        cnf.load(tmp_path / "no" / "such")
    with pytest.raises(cnf.CheckpointError, match=r"run's folder.*holds model.safetensors; name"):
        cnf.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(cnf.CheckpointError, match="which holds nothing"):
        cnf.load(tmp_path / "empty")


def test_error_for_data_in_place_of_a_flow_names_the_reader_of_data(tmp_path):
    assert "got moons, which is not there; data are read by cnf.data.load('moons')" in refusal(
        load, "moons"
    )
    assert "data are read by cnf.data.load(" in refusal(load, tmp_path / "own.csv")


@pytest.mark.parametrize("name", ["flow.pt", "flow.ckpt", "flow.model", "flow"])
def test_what_save_wrote_is_loaded_whatever_it_is_called(name, tmp_path):
    flow = cnf.models.realnvp(2, hidden=(4,))
    cnf.save(flow, tmp_path / name)
    for a, b in zip(load(tmp_path / name).parameters(), flow.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(cnf.CheckpointError, match=r"a folder that is there, got .*sub; make it"):
        cnf.save(cnf.models.realnvp(2, hidden=(4,)), tmp_path / "sub" / "x")
