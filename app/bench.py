"""`depthscope bench module:function`: what recording costs on one's own model and machine."""

from typing import TYPE_CHECKING

import click

from app.choosing import about_a_model

if TYPE_CHECKING:
    from probes.target import Target


@click.command()
@about_a_model
@click.option(
    "--every", default=10, show_default=True, type=click.IntRange(1), help="Steps between recorded vectors."
)
@click.option(
    "--matrices-every", default=100, show_default=True, type=click.IntRange(1), help="And between matrices."
)
@click.option(
    "--pairs",
    default=25,
    show_default=True,
    type=click.IntRange(1),
    help="Recorded and unrecorded steps to compare.",
)
@click.option("--compile", "compiled", is_flag=True, help="Run the model through torch.compile.")
def bench(found: "Target", every: int, matrices_every: int, pairs: int, compiled: bool, **choice) -> None:
    """Measure what recording costs a model, beside the same steps unrecorded.

    FUNCTION takes no arguments and returns (model, batch): the batch is a tensor, a tuple of positional or a dict of
    keyword arguments, on the model's device. Or it returns a dict with model, batch and, as far as wanted, loss (a
    function of the model's output) and optimizer. MODULE is looked for in the current directory first.
    """
    from probes import RunError, benching

    if found.args is None:
        raise RunError(f"{found.name} gave a model without a batch: return (model, batch).")
    cost = benching.bench(
        found.model,
        found.kwargs or found.args,
        optimizer=found.optimizer,
        loss=found.loss,
        every=every,
        matrices_every=matrices_every,
        compile=compiled,
        pairs=pairs,
        **choice,
    )
    click.echo(cost)
