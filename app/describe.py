"""`depthscope describe module:function`: what the probes would see in a model."""

from typing import TYPE_CHECKING

import click

from app.choosing import about_a_model

if TYPE_CHECKING:
    from probes.target import Target


@click.command()
@about_a_model
def describe(found: "Target", **choice: tuple[str, ...] | None) -> None:
    """Print a model's layers, where the probes see them, and whether its residual stream adds up.

    FUNCTION takes no arguments and returns the model, or (model, batch) for the forward that is tried. MODULE is looked
    for in the current directory first.
    """
    from probes import describing

    batch = None if found.args is None else found.kwargs or found.args
    click.echo(describing.describe(found.model, batch, **choice))
