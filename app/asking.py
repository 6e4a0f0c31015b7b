"""What somebody asks `depthscope attribute` for, checked as far as the command and the run alone tell. Needs no torch."""

from dataclasses import dataclass
from pathlib import Path

from app import checkpoints
from probes.attributed import MASS, METHODS
from probes.manifest import RunError
from probes.run import Run
from probes.sizes import bytes_in

TARGETS = {"loss": 0, "token": 1, "difference": 2}  # and how many tokens each is about


@dataclass(frozen=True)
class Asked:
    """What a command asks for, checked as far as the command alone tells."""

    run: Run
    methods: tuple[str, ...]
    target: str
    tokens: tuple[int, ...]
    position: int
    mass: str
    sequences: int
    context: int
    context_given: bool
    step: int | None
    steps: int
    samples: int
    seed: int
    what_if: bool
    memory: float | None
    device: str | None
    dry_run: bool
    data: Path | None
    model: str | None
    choice: dict


def asked(folder: Path, options: dict) -> Asked:
    """Raises RunError, in one sentence."""
    run = Run(folder)
    names = tuple(name.strip() for name in options["methods"].split(",") if name.strip())
    methods = tuple(METHODS) if names == ("all",) else names
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise RunError(
            f"There is no method {', '.join(unknown) or 'given'}: choose among {', '.join(METHODS)}, or all."
        )
    if options["target"] not in TARGETS:
        raise RunError(f"There is no target {options['target']}: choose among {', '.join(TARGETS)}.")
    if options["mass"] not in MASS:
        raise RunError(f"There is no mass {options['mass']}: choose {' or '.join(MASS)}.")
    if (wanted := TARGETS[options["target"]]) != len(options["tokens"]):
        raise RunError(
            f"The target {options['target']} is about {wanted or 'no'} token{'s' * (wanted != 1)}: give --token "
            f"{'twice' if wanted == 2 else 'once' if wanted else 'not at all'}."
        )
    training = run.config.get("training")
    known = [run.config.get("context"), training.get("context") if isinstance(training, dict) else None, 128]
    context = options["context"] or min(size for size in known if isinstance(size, int) and size > 1)
    if options["model"] is None and isinstance(known[0], int) and context > known[0]:
        raise RunError(f"--context {context} is more than the model of {run.name} takes: at most {known[0]}.")
    choice = {name: options[name] for name in ("stack", "layers", "norms")}
    given = {name: options[name] for name in Asked.__dataclass_fields__ if name in options}
    memory = None if options["memory"] is None else bytes_in(options["memory"], "--memory")
    given |= {"memory": memory, "context": context, "context_given": options["context"] is not None}
    return Asked(**given | {"run": run, "methods": methods, "choice": choice})


def files(asked: Asked, given: Path | None) -> list[Path]:
    """The checkpoints that are meant: one, all in a folder, or the last that the run saved."""
    run = asked.run
    if given is not None and not given.is_dir():
        return [given]
    if given is not None:
        found = sorted(
            path for path in given.iterdir() if path.suffix in (".safetensors", ".pt", ".pth", ".bin")
        )
        if not found:
            raise RunError(
                f"There is no checkpoint in {given}: give the file that holds the model's parameters."
            )
        if asked.step is not None and len(found) > 1:
            raise RunError(
                f"--step is of one checkpoint, and {given} holds {len(found)}: give the file that it belongs to."
            )
        return found
    found = checkpoints.checkpoints(run.path)
    if not found:
        raise RunError(
            f"{run.name} has saved no checkpoint: give the file of the model's parameters with --checkpoint "
            "(depthscope demo saves its own with --checkpoint-every)."
        )
    return found[-1:]
