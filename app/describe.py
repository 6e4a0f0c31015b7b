"""`depthscope describe module:function`: what the probes would see in a model."""

import click


@click.command()
@click.argument("target", metavar="MODULE:FUNCTION")
@click.option(
    "--stack", multiple=True, help="The list of transformer blocks to look at, where there are several."
)
@click.option("--layers", multiple=True, help="Pattern of the sublayers' module names (with --norms).")
@click.option(
    "--norms", multiple=True, help="Pattern of the modules that receive each layer's state and the final one."
)
def describe(target: str, stack: tuple[str, ...], layers: tuple[str, ...], norms: tuple[str, ...]) -> None:
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
        said = describing.describe(
            found.model, batch, stack=stack or None, layers=layers or None, norms=norms or None
        )
    except RunError as error:
        raise click.ClickException(str(error)) from error
    click.echo(said)
