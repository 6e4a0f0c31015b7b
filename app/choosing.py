"""The model a command is about, and which of its layers: what `depthscope describe` and `bench` ask alike."""

from collections.abc import Callable

import click


def about_a_model(command: Callable) -> Callable:
    """Give a command the argument `target` and the options `stack`, `layers` and `norms`, None where not given."""
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
        click.argument("target", metavar="MODULE:FUNCTION"),
    ):
        command = add(command)
    return command


def _given(context: click.Context, option: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...] | None:
    return value or None
