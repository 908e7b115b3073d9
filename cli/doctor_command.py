"""``d3tom-export doctor``"""

from __future__ import annotations

from dataclasses import asdict

import click

from . import common


@click.command("doctor", cls=common.Command, first="json")
@common.json_option
def command(json_file: str | None) -> None:
    """Say for every backend, building, reporting and serving whether it works here and, if not, what to install."""
    from d3tom_export.doctor import examine, machine

    findings, facts = examine(), machine()
    common.write_json(json_file, {"machine": facts, "backends": [asdict(finding) for finding in findings]})
    if json_file == "-":
        return
    click.echo(", ".join(f"{name} {value}" for name, value in facts.items()))
    for finding in findings:
        click.echo(f"{'yes' if finding.usable else 'no ':3}  {finding.name:29} {finding.found}")
        if finding.remedy:
            click.echo(f"{'':5}{'':29} {finding.remedy}")
