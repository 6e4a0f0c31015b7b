"""A chart taken apart: its unchanging specification, the numbers in it, and its tables, so that only these travel."""

import json

import altair as alt
import pandas as pd

from app.charts import TURN


def separate(chart: alt.TopLevelMixin) -> tuple[str, dict, dict[str, pd.DataFrame]]:
    """The specification as JSON, the values of its signals, and its tables by name.

    Its title stays out, for the page writes it. Domains of scales and values of axes and legends become signals: a growing run changes those, not the chart.
    """
    tables: dict[str, pd.DataFrame] = {}

    def take(data):
        if not isinstance(data, pd.DataFrame):
            return {"name": "none", "values": []} if data is None else data
        name = next((name for name, known in tables.items() if known is data), f"rows{len(tables)}")
        tables[name] = data
        return {"name": name}

    with TURN:
        alt.data_transformers.register("depthscope", take)
        with alt.data_transformers.enable("depthscope"):
            spec = chart.to_dict(format="vega-lite", validate=False)
    spec.pop("datasets", None)
    spec.pop("title", None)
    signals: dict = {}
    for encoding in _encodings(spec):
        for name, channel in encoding.items():
            if not isinstance(channel, dict):
                continue
            scale = channel.get("scale")
            if isinstance(scale, dict) and _numbers(scale.get("domain")):
                ends = enumerate(scale["domain"])
                scale["domain"] = [_signal(signals, f"{name}_domain_{i}", value) for i, value in ends]
            for guide in (channel.get("axis"), channel.get("legend")):
                if isinstance(guide, dict) and _numbers(guide.get("values")):
                    guide["values"] = _signal(signals, f"{name}_values", guide["values"])
    for param in spec.get("params", ()):
        if "value" in param and "select" not in param:
            signals[param["name"]] = param.pop("value")
    named = {param["name"] for param in spec.get("params", ())}
    if signals:
        spec["params"] = [*spec.get("params", []), *({"name": name} for name in signals if name not in named)]
    return json.dumps(spec), signals, tables


def _encodings(spec: dict):
    if "encoding" in spec:
        yield spec["encoding"]
    for part in (*spec.get("layer", ()), *spec.get("hconcat", ()), *spec.get("vconcat", ())):
        yield from _encodings(part)


def _numbers(values) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, int | float) for v in values)


def _signal(signals: dict, name: str, value) -> dict:
    """Layers that say the same share a signal, so that Vega-Lite sees one scale."""
    name = f"now_{name}"
    while name in signals and signals[name] != value:
        name += "_"
    signals[name] = value
    return {"expr": name}
