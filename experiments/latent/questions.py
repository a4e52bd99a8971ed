"""What is asked of a space of codes; each answer is a number with what it is of."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from attributes import ATTRIBUTES, OPERATIONS
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, cross_val_predict, cross_val_score
from spaces import Judge, Latent, Options, Pictures, Space
from torch import Tensor

import cnf
from cnf.data import Images
from cnf.dynamics.divergence import Hutchinson
from cnf.metrics import bits_per_dim
from cnf.plotting import arc
from cnf.random import stream
from cnf.transforms.continuous import is_continuous

WAYS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"linear": torch.lerp, "arc": arc}
LEAST = 0.05  # of what was asked, that a move must change to be scaled


class Answer(NamedTuple):
    """A number: of which question, of what in it, where along the line."""

    question: str
    of: str
    at: float | str
    number: str
    value: float


class Pairs(NamedTuple):
    """Test pictures to go from and to; the first ones share their digit, the others do not."""

    first: Tensor
    last: Tensor
    digits: Tensor
    ends: Tensor

    @property
    def same(self) -> Tensor:
        return self.digits == self.ends


def pairs_of(test: Images, count: int, seed: int) -> Pairs:
    """Pairs of pictures, half of them of one digit, all of them different pictures."""
    assert test.labels is not None
    order = torch.randperm(len(test.x), generator=stream(seed, "pairs")).tolist()
    found: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    while min(map(len, found.values())) < count // 2:
        one, other = order.pop(), order.pop()
        found[bool(test.labels[one] == test.labels[other])].append((one, other))
    rows = torch.tensor(found[True][: count // 2] + found[False][: count // 2])
    first, last = rows.T
    return Pairs(test.x[first], test.x[last], test.labels[first], test.labels[last])


def bits(flow: cnf.Flow, x: Tensor, seed: int) -> float:
    """Bits per dimension by one draw of the noise, of a continuous flow by one probe, too."""
    estimate = None
    if is_continuous(flow.transform):
        estimate = Hutchinson(1, generator=stream(seed, "probes"))
    noise = stream(seed, "noise of bits")
    return bits_per_dim(flow, x.to(torch.uint8), divergence=estimate, generator=noise).value


def round_trip(
    space: Space, data: Pictures, judge: Judge, seed: int, config: Options
) -> Iterator[Answer]:
    """The error of decode(encode(x)), in gray levels, and how much of a code is noise."""
    rows = torch.randperm(len(data.test.x), generator=stream(seed, "round trip"))
    x = data.test.x[rows[: config["round_trip"]]].float()

    def told(of: str, error: Tensor) -> Iterator[Answer]:
        largest = error.abs().flatten(1).amax(1)
        yield Answer("round trip", of, "", "max", largest.max().item())
        yield Answer("round trip", of, "", "median", largest.median().item())
        yield Answer("round trip", of, "", "rms", error.square().mean().sqrt().item())

    z = space.encode(x, stream(seed, "noise"))
    yield from told("pictures", space.decode(z) - x)
    if not isinstance(space, Latent):
        return
    again = space.encode(x, stream(seed, "other noise"))
    apart = (z - again).square().sum(1).mean() / (z - z.roll(1, 0)).square().sum(1).mean()
    yield Answer("round trip", "codes", "", "noise", apart.item())
    yield Answer("round trip", "codes", "", "norm", z.square().mean().sqrt().item())
    yield Answer("round trip", "codes", "", "bits", bits(space.flow, x, seed))
    noisy, flows = space.noisy(x, stream(seed, "noise")), {"numbers": space.real}
    if is_continuous(space.real.transform):
        flows["numbers, tight"] = space.real.with_solver(cnf.Solver.of(config["tight"]))
    for of, flow in flows.items():
        some = noisy if of == "numbers" else noisy[: config["tight_pictures"]]
        with torch.no_grad():
            yield from told(of, flow.decode(flow.encode(some)) - some)


def interpolation(
    space: Space, data: Pictures, judge: Judge, seed: int, config: Options
) -> Iterator[Answer]:
    """What the judge makes of the pictures between two, on the line and on the arc."""
    pairs = pairs_of(data.test, config["pairs"], seed)
    noise = stream(seed, "noise of pairs")
    first, last = space.encode(pairs.first, noise), space.encode(pairs.last, noise)
    ends = torch.cat([first, last]).square().sum(1).mean().sqrt()
    ways = [("ends", 0.0), *((way, share) for way in WAYS for share in config["shares"])]
    for way, share in ways:
        z = WAYS[way](first, last, share) if way in WAYS else first
        x = space.decode(z)
        p = judge.probabilities(x)
        kept = p.argmax(1) == pairs.digits
        either = kept | (p.argmax(1) == pairs.ends)
        found = {
            "kept": kept[pairs.same].double().mean().item(),
            "either": either[~pairs.same].double().mean().item(),
            "entropy": torch.special.entr(p).sum(1).mean().item(),
            "norm": (z.square().sum(1).mean().sqrt() / ends).item(),
        }
        if share in (0.0, 0.5):
            found["auc"] = auc(x, data.test, seed)
            if isinstance(space, Latent):
                found["bits"] = bits(space.flow, x, seed)
        for number, value in found.items():
            yield Answer("interpolation", way, share, number, value)


def auc(x: Tensor, test: Images, seed: int) -> float:
    """How well a random forest tells pictures from test pictures: 0.5 is not at all."""
    rows = torch.randperm(len(test.x), generator=stream(seed, "others"))[: len(x)]
    both = torch.cat([test.x[rows].float(), x]).flatten(1).numpy()
    labels = np.repeat([0, 1], len(x))
    forest = RandomForestClassifier(200, random_state=seed)
    folds = KFold(5, shuffle=True, random_state=seed)
    p = cross_val_predict(forest, both, labels, cv=folds, method="predict_proba")[:, 1]
    return float(roc_auc_score(labels, p))


def measured(x: Tensor) -> Tensor:
    """Both attributes, shape (N, 2)."""
    return torch.stack([attribute(x) for attribute in ATTRIBUTES.values()], 1)


def directions(codes: Tensor, attributes: Tensor, labels: Tensor) -> Tensor:
    r"""How the mean code changes with each attribute, others and the digit as they are, (2, D).

    Least squares of codes on the attributes and the digit: of one attribute in two values this is
    the difference of means.
    """
    digits = torch.nn.functional.one_hot(labels, 10)
    known = torch.cat([attributes, digits.to(attributes)], 1)
    fit = LinearRegression(fit_intercept=False).fit(known.numpy(), codes.double().numpy())
    return torch.from_numpy(fit.coef_[:, : attributes.shape[1]].T).float()


class Line(NamedTuple):
    """Where pictures begin, and how an attribute of them is changed.

    Attributes:
        calibrating: Beginnings of training pictures.
        start: Beginnings of test pictures.
        apply: From beginnings and amounts, shape (N,), to pictures.
    """

    calibrating: Tensor
    start: Tensor
    apply: Callable[[Tensor, Tensor], Tensor]

    def gain(self, attribute: int, unit: float) -> float:
        """The mean change of an attribute for a unit that is asked for, from both sides."""
        ask = torch.full((len(self.calibrating),), unit)
        up, down = (measured(self.apply(self.calibrating, ask * sign)) for sign in (1, -1))
        return max((up - down)[:, attribute].mean().item() / (2 * unit), LEAST)


def arithmetic(
    space: Space | None, data: Pictures, judge: Judge, seed: int, config: Options
) -> Iterator[Answer]:
    """The attribute asked for and that measured, of odd digits, by a direction of even ones.

    Args:
        space: Whose codes are moved; None for scipy's operations on pictures.
        data: Directions are of training pictures, and move test pictures.
        judge: Tells whether the digit is kept.
        seed: Of the choice of pictures.
        config: All of config.yaml.
    """
    learned, moved = chosen(data, seed, config)
    known, scale = measured(learned.x), measured(learned.x).std(0)
    if space is None:
        few, start = learned.x[: config["calibrated"]].float(), moved.x.float()
        lines = [Line(few, start, OPERATIONS[name]) for name in ATTRIBUTES]
    else:
        assert learned.labels is not None
        noise = stream(seed, "noise of attributes")
        codes, start = space.encode(learned.x, noise), space.encode(moved.x, noise)
        basis = directions(codes, known, learned.labels)
        few, rms = codes[: config["calibrated"]], codes.square().sum(1).mean().sqrt()
        lines = [Line(few, start, along(space, direction)) for direction in basis]
    for index, name in enumerate(ATTRIBUTES):
        gain = lines[index].gain(index, scale[index].item())
        yield Answer("arithmetic", name, "", "gain", gain)
        if space is not None:
            size = basis[index].norm() * scale[index] / gain / rms
            yield Answer("arithmetic", name, "", "step", size.item())
            yield Answer("arithmetic", name, "", "r2", readout(codes, known[:, index], seed))
        for strength in config["strengths"]:
            amount = torch.full((len(moved.x),), (strength * scale[index] / gain).item())
            x = lines[index].apply(start, amount)
            for number, value in changes(x, moved, index, strength, scale, judge).items():
                yield Answer("arithmetic", name, strength, number, value.item())


def changes(
    x: Tensor, moved: Images, index: int, strength: float, scale: Tensor, judge: Judge
) -> dict[str, Tensor]:
    """What has become of pictures whose attribute was to change by a strength, in deviations."""
    assert moved.labels is not None
    change = (measured(x) - measured(moved.x)) / scale
    kept = judge.probabilities(x).argmax(1) == moved.labels
    return {
        "error": (change[:, index] - strength).abs().mean(),
        "change": change[:, index].mean(),
        "right": (change[:, index] * strength > 0).double().mean(),
        "other": change[:, 1 - index].abs().mean(),
        "kept": kept.double().mean(),
    }


def along(space: Space, direction: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Codes moved along a direction, decoded."""
    return lambda z, amount: space.decode(z + amount[:, None] * direction)


def chosen(data: Pictures, seed: int, config: Options) -> tuple[Images, Images]:
    """Training pictures of even digits, and test pictures of odd ones."""
    parts = []
    for images, odd, count in ((data.train, 0, "directions"), (data.test, 1, "moved")):
        assert images.labels is not None
        rows = torch.nonzero(images.labels % 2 == odd)[:, 0]
        order = torch.randperm(len(rows), generator=stream(seed, count))
        parts.append(images.take(rows[order[: config[count]]]))
    return parts[0], parts[1]


def readout(codes: Tensor, attribute: Tensor, seed: int) -> float:
    """R² of the attribute by a ridge regression on codes, cross-validated."""
    ridge = RidgeCV(np.logspace(-2, 4, 7))
    folds = KFold(5, shuffle=True, random_state=seed)
    scores: Any = cross_val_score(ridge, codes.double().numpy(), attribute.numpy(), cv=folds)
    return float(scores.mean())
