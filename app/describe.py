"""`depthscope describe module:function`: what the probes would see in a model."""

import click

from app.choosing import about_a_model


@click.command()
@about_a_model
def describe(target: str, **choice: tuple[str, ...] | None) -> None:
    """Print a model's layers, where the probes see them, and whether its residual stream adds up.

    FUNCTION takes no arguments and returns the model, or (model, batch) for the forward that is tried. MODULE is looked
    for in the current directory first.
    """
    try:
        from probes import RunError, describing
        from probes import target as targets
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f'describe needs {error.name}, and only the viewer is installed: pip install "depthscope[probes]".'
        ) from error
    try:
        found = targets.load(target)
        batch = None if found.args is None else found.kwargs or found.args
        said = describing.describe(found.model, batch, **choice)
    except RunError as error:
        raise click.ClickException(str(error)) from error
    click.echo(said)
