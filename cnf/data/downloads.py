"""Where well-known data sets lie, and how they come there if a network is there."""

import contextlib
import hashlib
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path


def places(name: str) -> list[Path]:
    """Folders in which a data set is looked for: `$CNF_DATA/name`, then `~/.cache/cnf/name`.

    Args:
        name: Name of the data set.
    """
    own = os.environ.get("CNF_DATA")
    return [*([Path(own) / name] if own else []), Path.home() / ".cache" / "cnf" / name]


def find(name: str, files: Mapping[str, str], address: str) -> list[Path]:
    """The files of a data set, downloaded to `~/.cache/cnf/name` if they lie nowhere.

    A file that ends in .gz may lie there unpacked, without that ending.

    Args:
        name: Name of the data set.
        files: The MD5 of each file as it lies at the address, by its name.
        address: The folder on the network that holds them.

    Raises:
        FileNotFoundError: They are not there, and cannot be downloaded.
        ValueError: What was downloaded is not what it should be.
    """
    for folder in places(name):
        found = [_in(folder, file) for file in files]
        if all(found):
            return [path for path in found if path is not None]
    folder = places(name)[-1]
    for file, md5 in files.items():
        if _in(folder, file) is None:
            _download(name, address + file, folder / file, md5)
    return [folder / file for file in files]


def lying(name: str, files: Sequence[str], remedy: str) -> Path:
    """The first of the files that lies where a data set is looked for; none is downloaded.

    Args:
        name: Name of the data set.
        files: Names of files, any of which will do.
        remedy: Where the file is to be had, for the message.

    Raises:
        FileNotFoundError: None of them lies there.
    """
    for folder in places(name):
        for file in files:
            if (folder / file).is_file():
                return folder / file
    looked = " and ".join(map(str, places(name)))
    raise FileNotFoundError(
        f"load: expected {' or '.join(files)} of {name} in {looked}, found none; put it there, or "
        f"set CNF_DATA to the folder that holds {name}/: {remedy}"
    )


def _in(folder: Path, file: str) -> Path | None:
    found = (folder / name for name in (file, file.removesuffix(".gz")))
    return next((path for path in found if path.is_file()), None)


def _download(name: str, url: str, path: Path, md5: str) -> None:
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as answer, partial.open("wb") as file:
            shutil.copyfileobj(answer, file)
    except (OSError, urllib.error.URLError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        looked = " and ".join(map(str, places(name)))
        raise FileNotFoundError(
            f"load: expected {path.name} of {name} in {looked}, found none, and {url} cannot be "
            f"downloaded ({error}); put the files there, or set CNF_DATA to the folder that holds "
            f"{name}/"
        ) from None
    got = hashlib.md5(partial.read_bytes(), usedforsecurity=False).hexdigest()
    if got != md5:
        partial.unlink()
        raise ValueError(
            f"load: expected a file with MD5 {md5} at {url}, got one with {got}; download it by "
            f"hand to {path.parent}"
        )
    partial.replace(path)
