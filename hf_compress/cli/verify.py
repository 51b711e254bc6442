"""`hf-compress verify`: prove a checkpoint again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .output import Output, proven, size

if TYPE_CHECKING:
    from ..checkpoint.record import Check

NAME = "verify"
EXAMPLES = ("hf-compress verify qwen3-int4", "hf-compress --json verify qwen3-int4")


def command(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint written by hf_compress.")],
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Reload DIR in a clean process, compare its outputs, and record the proof that is possible here."""
    from .. import verify

    output = Output.of(ctx, as_json, quiet)
    output.calm_libraries()
    with output.status("Proving"):
        proof = verify(path)
    output.text(f"{path}: proof {proven(proof)}")
    output.table(_check(check) for check in proof.checks)
    output.text(f"  {len(proof.files)} files match their SHA-256")
    if proof.resident_bytes is not None:
        before, after = map(size, proof.resident_bytes)
        output.text(f"  stock reload holds {before}, and {after} after its first forward")
    output.result({"path": str(path), "proof": proof.model_dump(mode="json")})


def _check(check: Check) -> tuple[str, ...]:
    """One comparison: its name, how far off, and how far it may be."""
    allowed = "must be equal" if check.limit == 0 else f"at most {check.limit:.0e}"
    return (check.name, f"max |Δ| {check.difference:.3g}", f"relative {check.relative:.3g}", f"({allowed})")
