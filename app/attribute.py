"""`depthscope attribute RUN`: what the loss would be without each depth edge and each layer; written into the run."""

from pathlib import Path

import click

from app.choosing import layer_options
from app.places import Here

ELSEWHERE = (
    "attribute reads a checkpoint and writes into the run, on this machine: copy the run here, attribute it, and copy its "
    "folder attribution/ back."
)

_MOST_STEP = 10**15  # as in the vocabulary, which takes numpy to import


@click.command()
@click.argument("folder", metavar="RUN", type=Here(ELSEWHERE))
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="The model's parameters, or a folder of such files  [default: the last in RUN/checkpoints]",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Token ids (.npy, .safetensors), or a text (.zip: texts) for models of bytes  [default: the model's own batch, or the text "
    "the run kept for validation]",
)
@click.option("--model", help="How the model is made, MODULE:FUNCTION  [default: by the run's configuration]")
@click.option(
    "--methods",
    default="gradient,ablation,removal",
    show_default=True,
    help="Among gradient, ablation, removal, integrated and shapley; or all.",
)
@click.option(
    "--target", default="loss", show_default=True, help="loss, token (its logit) or difference (of two)."
)
@click.option(
    "--token",
    "tokens",
    multiple=True,
    type=click.IntRange(0),
    help="Id of the target's token; twice for a difference.",
)
@click.option("--position", default=-1, show_default=True, help="Where the logit is taken, in each sequence.")
@click.option(
    "--mass",
    default="kept",
    show_default=True,
    help="kept or shared: the weight of a removed source. Behind a norm both give the same.",
)
@click.option(
    "--sequences", default=16, show_default=True, type=click.IntRange(1), help="Sequences of tokens."
)
@click.option(
    "--context", type=click.IntRange(2), help="Tokens in each  [default: the model's context, at most 128]"
)
@click.option(
    "--step", type=click.IntRange(0, _MOST_STEP), help="Step of the checkpoint  [default: what it tells]"
)
@click.option(
    "--steps", default=16, show_default=True, type=click.IntRange(1), help="Of integrated gradients."
)
@click.option(
    "--samples", default=8, show_default=True, type=click.IntRange(1), help="Orders for Shapley values."
)
@click.option("--seed", default=0, show_default=True, help="Of those orders.")
@click.option(
    "--what-if", is_flag=True, help="Measure the loss without the least important layers and edges, too."
)
@click.option(
    "--device", help="cuda, or another that torch knows  [default: the CPU, or where --model puts it]"
)
@click.option("--memory", help="What this process may take, as 8GB  [default: half of what is free]")
@click.option("--dry-run", is_flag=True, help="Say what it would cost, and stop.")
@layer_options
def attribute(folder: Path, **options) -> None:
    """Measure which depth edges and which layers the loss needs, and write it into RUN.

    Interrupted, it goes on where it was when the same command is given again. The dashboard shows it on its page
    Attribution. Recorded shards are not touched.
    """
    try:
        from app.asking import asked, files
        from app.attributing import attribute_all
        from probes import RunError
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f'attribute needs {error.name}, and only the viewer is installed: pip install "depthscope[probes]".'
        ) from error
    try:
        wanted = asked(folder, options)
        attribute_all(wanted, files(wanted, options["checkpoint"]))
    except RunError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(
            f"It cannot be written into {folder}: {error.strerror or error}."
        ) from error
    except KeyboardInterrupt:
        raise click.ClickException(
            "Stopped; what was done is kept. Give the same command again to go on."
        ) from None
