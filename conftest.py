"""Adapters of libraries that are not installed have no examples to run."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("sbi") else ["cnf/adapters/sbi.py"]
