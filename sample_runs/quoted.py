"""The figures that docs/sample-runs.md quotes, computed from the runs: `python sample_runs/quoted.py [RUNS [PAGE]]`.

Each is a passage of that page, filled in with what the runs give; those that do not stand there are said, and the exit
code is 1. Where runs were recorded anew, this is what to write, and around it what it means.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402

import probes  # noqa: E402
from app import causes, reads, verdicts  # noqa: E402
from probes.attributed import ABLATION, EDGES, EFFECT, LAYERS, RANDOM, REMOVAL, SHARE, WEIGHT  # noqa: E402
from sample_runs.plans import plans  # noqa: E402

PAGE = HERE.parent / "docs" / "sample-runs.md"


class Runs(dict):
    """The runs of a folder by name, opened where they are asked for."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __missing__(self, name: str) -> probes.Run:
        self[name] = probes.open_run(self._folder / name)
        return self[name]

    def last(self, name: str, metric: str) -> np.ndarray:
        return self[name][metric][-1]


def main(folder: Path = HERE, page: Path = PAGE) -> int:
    missing = absent(page.read_text(encoding="utf-8"), passages(Runs(folder)))
    for passage in missing:
        print(f"not in {page.name}: {passage}")
    print(
        f"{len(missing)} passages are not as the runs have them."
        if missing
        else "All is as the runs have it."
    )
    return int(bool(missing))


def absent(text: str, wanted: Iterator[str]) -> list[str]:
    """The passages that a text does not hold, however its lines are broken."""
    text = re.sub(r"\s+", " ", text)
    return [passage for passage in wanted if passage not in text]


def passages(runs: Runs) -> Iterator[str]:
    yield from table(runs)
    yield from depth(runs)
    yield from depth_attention(runs)
    yield from attribution(runs)
    yield from twins(runs)
    yield from experts(runs)
    yield from unhealthy(runs)


def table(runs: Runs) -> Iterator[str]:
    """The end of each row of the table of runs."""
    for name in [plan.name for plan in plans("cpu") if "unhealthy" not in plan.tags]:
        device = runs[name].config["training"]["device"]
        plan = next(plan for plan in plans(device) if plan.name == name)
        value = runs.last(plan.name, "val_loss")
        steps = plan.training.steps
        at = (
            f"{plan.kill_at + 1} of {steps} | {value:.3f} at step {plan.kill_at}"
            if plan.kill_at
            else f"{steps} | {value:.3f}"
        )
        yield f"| {at} |"


def depth(runs: Runs) -> Iterator[str]:
    """Losses, states, shares and gradients."""
    loss = {
        name: float(runs.last(name, "val_loss"))
        for name in ("prenorm", "full", "block", "kimi-prenorm", "kimi-block")
    }
    yield (
        f"Full and Block are {loss['prenorm'] - loss['full']:.2f} and {loss['prenorm'] - loss['block']:.2f} ahead of PreNorm, "
        f"and converted Kimi Linear is {loss['kimi-block'] - loss['kimi-prenorm']:.2f} *behind* the original"
    )
    state = {
        name: runs.last(name, "hidden_rms")
        for name in ("prenorm", "deepnorm", "full", "block", "deep-prenorm", "deep-block")
    }
    yield f"The state of PreNorm grows from {state['prenorm'][2]:.1f} in front of layer 3 to {state['prenorm'][-1]:.1f} at the end"
    yield f"DeepNorm holds it at {state['deepnorm'][-1]:.1f} by its norms"
    yield f"({state['full'][-1]:.1f} in Full's final state, {state['block'][-1]:.1f} in Block's)"
    yield f"from {state['deep-prenorm'][2]:.2f} to {state['deep-prenorm'][-1]:.1f}, where Block stays at {state['deep-block'][-1]:.2f}"
    output = runs.last("prenorm", "output_rms")
    yield f"whose output is {output[2] / output[0]:.0f} times the embedding"
    share = {name: runs.last(name, "mixing_share")[-1] for name in ("prenorm", "full")}
    rest = np.median(share["prenorm"][3:])
    yield f"Of PreNorm's final state layer 2 makes up {share['prenorm'][2]:.0%}, every later layer about {rest:.0%}".replace(
        "%", " %"
    )
    yield f"In Full AttnRes layer 2 makes up {share['full'][2]:.0%} still".replace("%", " %")
    ratio = {}
    for name in (
        "prenorm",
        "block",
        "full",
        "deepnorm",
        "deep-prenorm",
        "deep-block",
        "kimi-block",
        "kimi-prenorm",
    ):
        gradient = runs.last(name, "output_grad_rms")[1:]
        ratio[name] = gradient.max() / gradient.min()
    yield (
        f"From layer 1 to 24, largest over smallest: {ratio['prenorm']:.0f} in PreNorm, {ratio['block']:.1f} in Block, "
        f"{ratio['full']:.1f} in Full, {ratio['deepnorm']:.1f} in DeepNorm"
    )
    yield f"({ratio['deep-prenorm']:.1f} to {ratio['deep-block']:.1f})"
    yield f"the less even one ({ratio['kimi-block']:.1f} against {ratio['kimi-prenorm']:.1f})"


def depth_attention(runs: Runs) -> Iterator[str]:
    """What reads of three sources or more take from the embedding and from the newest source."""

    def told(name: str, kind: str, measure: str) -> str:
        return f"{100 * reads.over_training(runs[name], name, kind)[measure].iloc[-1]:.0f} %"

    mlp, attention = (
        [told(name, kind, "embedding") for name in ("full", "block")] for kind in ("mlp", "attention")
    )
    yield (
        f"the reads of MLPs give {mlp[0]} (Full) and {mlp[1]} (Block) of their weight to the embedding, those of attention "
        f"{attention[0]} and {attention[1]}"
    )
    newest = [told(name, "all", "newest") for name in ("full", "block")]
    yield f"gets {newest[0]} and {newest[1]}"


def attribution(runs: Runs) -> Iterator[str]:
    """Weight beside cause, and the what-ifs."""
    early, full = runs["full"].attributions()
    (block,), (prenorm,) = runs["block"].attributions(), runs["prenorm"].attributions()
    found = {
        name: causes.correlations(causes.edges(each, ABLATION))["value"].dropna()
        for name, each in (("full", full), ("block", block), ("early", early))
    }
    middle = {name: values.median() for name, values in found.items()}
    against = {name: f"{(values < 0).sum()} of {len(values)}" for name, values in found.items()}
    yield (
        f"is {middle['full']:.2f} in the median read of `full` and {middle['block']:.2f} in `block`, and negative in "
        f"{against['full'].replace(' of ', ' of ')} and {against['block']} reads. At step {early.step} of `full` it was "
        f"{middle['early']:.2f}, and negative in {against['early']}"
    )
    idle = verdicts.idle(block).links.iloc[0]
    yield (
        f"a weight of {idle['weight']:.2f}, {_number(idle['even'])} even shares, and without it the loss changes by "
        f"{idle['value']:+.5f} ± {2 * idle['error']:.4f} nats per token"
    )
    links = verdicts.idle(full)
    yield f"In `full` {len(links.links)} of {len(links.heavy)} links of high weight have an effect surely below a thousandth"
    rises = [each.layers[REMOVAL][1] for each in (prenorm, full, block)]
    yield f"without it the loss rises by {rises[0]:.1f} (`prenorm`), {rises[1]:.1f} (`full`) and {rises[2]:.1f} (`block`)"
    yield f"at step {early.step} `full` had {_number(len(verdicts.ballast(early)))}"
    for kind in (LAYERS, EDGES):
        for name, each in (("prenorm", prenorm), ("full", full), ("block", block)):
            curve = each.curves[kind]
            values = {
                r: verdicts.area(curve, r) for r in (EFFECT, SHARE, WEIGHT, RANDOM) if r in curve.values
            }
            best = min(values, key=values.get)
            cells = [_rise(values.get(r), r == best) for r in (EFFECT, SHARE, WEIGHT, RANDOM)]
            yield f"| {kind} of `{name}` | {' | '.join(cells)} |"


def _rise(value: float | None, best: bool) -> str:
    if value is None:
        return "–"
    return f"**{value:+.3f}**" if best else f"{value:+.3f}" if abs(value) < 0.5 else f"{value:+.2f}"


def _number(value: float) -> str:
    names = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return names[round(value)] if round(value) < len(names) else str(round(value))


def twins(runs: Runs) -> Iterator[str]:
    """PreNorm and Block of 24 transformer blocks."""
    told = {}
    for name in ("prenorm-24", "block-24"):
        state, output = runs.last(name, "hidden_rms"), runs.last(name, "output_rms")
        layers = len(state) - 1
        added = np.median((output[1:] / state[:-1])[layers // 2 :])
        gradient = runs.last(name, "output_grad_rms")[1:]
        told[name] = runs.last(name, "val_loss"), added, state[-1], gradient.max() / gradient.min()
    (loss, added, state, gradient), block = told["prenorm-24"], told["block-24"]
    yield f"PreNorm ends {loss - block[0]:.2f} behind Block"
    yield f"adds {100 * added:.0f} % of the size of the state it reads, in Block {100 * block[1]:.0f} %"
    yield f"the final state is {state:.1f} against {block[2]:.1f}"
    yield f"the largest output gradient is {gradient:.0f} times the smallest, against {block[3]:.1f}"
    ((plain,), (routed,)) = (runs[name].attributions() for name in ("prenorm-24", "block-24"))
    assert plain.about.data == routed.about.data and plain.about.tokens == routed.about.tokens
    removal = plain.layers[REMOVAL]
    yield f"without layer {int(removal.argmax()) + 1} PreNorm's loss rises by {removal.max():.1f}"
    yield f"and {_number(len(verdicts.ballast(plain)))} layers are surely ballast"
    none = "and none is" if verdicts.ballast(routed).empty else "and some are"
    yield f"in Block the most that a layer is worth is {routed.layers[REMOVAL].max():.2f}, {none}"
    rise = [verdicts.area(each.curves[LAYERS], SHARE) for each in (plain, routed)]
    yield f"the loss rises by {rise[0]:.3f} on average in PreNorm, by {rise[1]:.3f} in Block"


def experts(runs: Runs) -> Iterator[str]:
    def told(values: np.ndarray) -> str:
        known = values[np.isfinite(values)]
        return f"{known.min():.2f}–{known.max():.2f}"

    balance = {name: runs[name]["expert_balance"] for name in ("kimi-block", "kimi-prenorm")}
    yield (
        f"falls from {told(balance['kimi-block'][0])} to {told(balance['kimi-block'][-1])} within 120 steps, in `kimi-prenorm` "
        f"to {told(balance['kimi-prenorm'][-1])}"
    )


def unhealthy(runs: Runs) -> Iterator[str]:
    run = runs["unhealthy"]
    loss, states = run["loss"], run["hidden_rms"].max(axis=1)
    top = int(np.nanargmax(loss[3:])) + 3
    yield f"The loss spikes from {loss[top - 1]:.1f} to {loss[top]:.1f} at step {top}"
    yield f"the largest state is {states[top] / states[0]:,.0f} times what it was at first by then"
    broken = run["nonfinite"]
    row = int(broken.any(axis=1).argmax())
    yield f"At step {run.steps('nonfinite')[row]} the state into layer {int((broken[row] > 0).argmax()) + 1} passes what float16 can hold"


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))
