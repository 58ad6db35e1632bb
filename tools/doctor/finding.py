"""Finding: what one check found. Diagnosis: all of them, as `--json` prints it; `--json-schema` prints the schema."""

from __future__ import annotations

from typing import Literal

import msgspec

SCHEMA_VERSION = 1

Status = Literal["ok", "skipped", "warning", "problem"]
"""warning: Quire runs, worse than it could. problem: it will not start, or not do what was asked."""


class Finding(msgspec.Struct, frozen=True):
    """`name` is stable; a GPU is "gpu 0" when all is well, else there is one finding for each thing that is not ("gpu 0
    clocks", memory, power, errors, mode). `fix`: what to do, of a warning or problem."""

    name: str
    status: Status
    text: str
    fix: str = ""


class Diagnosis(msgspec.Struct, frozen=True):
    """`ok`: there is no problem; the exit code is 0 then, else 1."""

    schema_version: int
    ok: bool
    findings: list[Finding]


def diagnosis(findings: list[Finding]) -> Diagnosis:
    """Of all findings, in their order."""
    return Diagnosis(SCHEMA_VERSION, all(finding.status != "problem" for finding in findings), findings)
