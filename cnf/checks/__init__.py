"""`cnf.check`, which finds a wrong flow, and its parts."""

from cnf.checks.check import CHECKS, CheckReport, Finding, check

__all__ = ["CHECKS", "CheckReport", "Finding", "check"]
