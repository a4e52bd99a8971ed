"""Arguments of the command line as flags with one value each."""

from pathlib import Path
from typing import Any

import pytest

from cnf.arguments import error_message, normalized

KINDS = {
    "data": str,
    "seeds": list[int] | None,
    "options": dict[str, Any] | None,
    "lr": float | None,
    "n": int,
    "resume": bool,
    "resume_or": bool | Path,
}


@pytest.mark.parametrize(
    "words, expected",
    [
        ("moons", "--data=moons"),
        ("--lr -3 moons", "--lr=-3 --data=moons"),
        ("--data=moons --seeds 0", '--data=moons --seeds=["0"]'),
        ("--seeds [0,1]", "--seeds=[0,1]"),
        ("--seeds null", "--seeds=null"),
        ("--options.hidden 8,8 --options.a-b x", "--options.hidden=[8,8] --options.a_b=x"),
        ("--options.hidden [8,8] --data a,b", "--options.hidden=[8,8] --data=a,b"),
        ("--options {a:1,b:2}", "--options={a:1,b:2}"),
        ("--resume moons", "--resume=true --data=moons"),
        ("--resume false", "--resume=false"),
        ("--no-resume", "--resume=false"),
        ("--resume-or run", "--resume_or=run"),
        ("--resume-or --n 3", "--resume_or=true --n=3"),
        ("-n 3", "--n=3"),
        ("moons --lr 3 --help", "--help"),
    ],
)
def test_words_become_flags_with_one_value(words, expected):
    found = normalized(words.split(), KINDS, ["data"])
    assert " ".join(found).replace('["0", "1"]', '["0","1"]') == expected


@pytest.mark.parametrize(
    "words, said",
    [
        ("--sed 3", "unknown flag --sed. Did you mean --seeds?"),
        ("--lr", "expected a value behind --lr"),
        ("moons pinwheel", "unexpected 'pinwheel'"),
        ("--data moons pinwheel", "unexpected 'pinwheel'"),
        ("--no-lr", "unknown flag --no-lr"),
    ],
)
def test_error_names_the_wrong_word(words, said):
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        normalized(words.split(), KINDS, ["data"])


def test_error_names_missing_arguments_as_they_are_typed():
    error = ValueError("the following arguments are required: config.steps, data")
    assert error_message(error, KINDS) == "expected STEPS and DATA"
