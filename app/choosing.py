"""The model a command is about, and which of its layers: what `depthscope describe` and `bench` ask alike."""

import functools
from collections.abc import Callable

import click


def about_a_model(command: Callable) -> Callable:
    """A command given a `probes.target.Target` and the options `stack`, `layers` and `norms`, None where not given."""

    @functools.wraps(command)
    def run(target: str, **options) -> None:
        try:
            from probes import RunError
            from probes import target as targets
        except ModuleNotFoundError as error:
            raise click.ClickException(
                f"{command.__name__} needs {error.name}, and only the viewer is installed: "
                'pip install "depthscope[probes]".'
            ) from error
        try:
            command(targets.load(target), **options)
        except RunError as error:
            raise click.ClickException(str(error)) from error

    return click.argument("target", metavar="MODULE:FUNCTION")(layer_options(run))


def layer_options(command: Callable) -> Callable:
    """A command with the options `stack`, `layers` and `norms`."""
    for add in (
        click.option(
            "--norms",
            multiple=True,
            callback=_given,
            help="Pattern of the modules that receive each layer's state and the final one.",
        ),
        click.option(
            "--layers",
            multiple=True,
            callback=_given,
            help="Pattern of the sublayers' module names (with --norms).",
        ),
        click.option(
            "--stack",
            multiple=True,
            callback=_given,
            help="The list of transformer blocks to look at, where there are several.",
        ),
    ):
        command = add(command)
    return command


def _given(context: click.Context, option: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...] | None:
    return value or None
