"""Attribution: does the weight say what matters?"""

import pandas as pd
import streamlit as st

from app import causes, cells, draw, findings, pick, room, verdicts, view, words
from app.charts import palette
from app.charts.causes import agreement, paired, scatter
from app.charts.lines import lines
from app.charts.needed import ranked, removal
from app.charts.triangle import triangle
from app.derived import has, metric
from probes.attributed import EDGES, GRADIENT, INTEGRATED, KEPT, LAYERS, MASS, METHODS, TITLES, Attribution

LIVE = "live"
PLAIN = "A plain residual gives every source weight one: there is no routing to compare the attribution with, edge by edge."
HOW = (
    "no attribution yet: `depthscope attribute RUN --checkpoint FILE --data FILE` measures it for a saved model and "
    "writes it into the run."
)
MEANING = (
    "*Attribution* is the target without an edge (what one read takes from one source) or without a layer, minus the target "
    "with it: of a loss, above zero means that it is needed. Values stay signed; behind a norm those of one read sum to "
    "about zero, so they are no shares. Bars of errors are two standard errors over the sequences. *Rank correlation* is "
    "Spearman’s, of weight and signed attribution over the sources of one read. *Ballast* is a layer whose effect plus two "
    "standard errors is below a thousandth of the loss. Whether the others take over the weight of what is removed (*kept* or "
    "*shared*) makes no difference where the mix goes into a norm, which knows its direction alone. A *what-if* removes the least important first and is measured on "
    "other sequences than those that ranked them; its rankings are compared by the mean rise while half of all are removed. "
    "Of a logit neither direction is worse: there the size of the effect counts, and small is a hundredth of the largest. "
)


SLOPES = (GRADIENT, INTEGRATED)
SIGNED = (
    "Signed: behind a norm, which forgets how large its input is, the values of one read sum to about zero. They say what a "
    "source adds to the others’ direction or takes from it, and are no shares."
)
INCOMPLETE = (
    " Nor do integrated gradients sum to what the whole read does: that happens where it is scaled to next to nothing, between "
    "their steps."
)


def body(shown: list[room.Shown]) -> None:
    able = [one for one in shown if one.run.attributions() or has(one.run, causes.LIVE)]
    for one in shown:
        if problems := one.run.attribution_problems:
            st.warning(
                f"**{words.plain(one.name)}**: {words.plain(' '.join(problems))}", icon=":material/warning:"
            )
    lacking = [words.plain(one.name) for one in shown if one not in able]
    if able:
        _look(able)
    if lacking:
        verb = "has" if len(lacking) == 1 else "have"
        st.info(f"**{words.joined(lacking)}** {verb} {HOW}", icon=":material/info:")
    room.explain([causes.LIVE, "depth_weight", "mixing_share"], MEANING + _methods())


def _methods() -> str:
    return " ".join(f"*{TITLES[method]}*: {told}." for method, told in METHODS.items())


def _look(able: list[room.Shown]) -> None:
    left, right = st.columns(2, gap="medium")
    names = {one.name: one.name for one in able}
    name = pick.one("caused", "Run", names, where=left)
    one = next(one for one in able if one.name == name)
    newest = sorted(one.run.attributions(), key=lambda each: (each.step, each.about.created), reverse=True)
    found = {each.name: each for each in newest}
    options = {key: _label(each) for key, each in found.items()}
    if has(one.run, causes.LIVE):
        options[LIVE] = "Recorded while training: gradient × activation"
    chosen = pick.one("attribution", "Attribution", options, where=right)
    if chosen == LIVE:
        _live(one)
    else:
        _file(one, found[chosen])


def _label(found: Attribution) -> str:
    about = found.about
    more = "" if about.mass == KEPT else f", weights {about.mass}"
    return (
        f"Step {words.step(found.step or 0)}: {about.target}{more}, {about.sequences} × {about.tokens} tokens "
        f"({found.name[13:17]})"
    )


def _live(one: room.Shown) -> None:
    picture = st.container()
    step = pick.step([one.run], [causes.LIVE], st.container(key="player"))
    if step is None:
        return
    frame = causes.live(one.run, step)
    with picture:
        if frame["value"].notna().any():
            _edges(one, frame, metric(causes.LIVE).unit or "loss", step)
        else:
            st.info(
                f"Nothing of it is finite at step {words.step(step)}: the player leads back to where it was.",
                icon=":material/info:",
            )
    st.caption(
        f"{SIGNED} Single layers, spread over sequences and ablation need a saved model: `depthscope attribute` measures them."
    )


def _file(one: room.Shown, found: Attribution) -> None:
    about = found.about
    st.caption(
        words.plain(
            f"{words.capital(about.target)} {words.number(about.value)} of {about.checkpoint or 'the model'} on "
            f"{words.counted(about.sequences, 'sequence')} of {about.tokens} tokens ({about.data or 'a batch'}){'' if verdicts.plain(found) else f'; {MASS.get(about.mass, about.mass)}'}. "
            + " ".join(about.notes)
        )
    )
    methods = causes.edge_methods(found)
    if methods:
        method = pick.choice("cause", "Method", {name: TITLES[name] for name in methods})
        if method in SLOPES:
            st.caption(SIGNED + (INCOMPLETE if method == INTEGRATED else ""))
        _edges(one, causes.edges(found, method), about.unit, found.step or 0)
        if (links := verdicts.idle(found)) is not None:
            st.info(words.plain(links.sentence()), icon=":material/link_off:")
    _layers(one, found)
    _what_if(one, found)
    _over_training(one, found)


def _edges(one: room.Shown, frame: pd.DataFrame, unit: str, step: int) -> None:
    """Weight and attribution of every edge, of one read, read by read, and against each other."""
    frame = frame.assign(row=frame["number"] - 1)
    unknown = not frame["weight"].notna().any()
    # In a deep baseline no state may be solved: its weights are one nevertheless.
    plain = causes.all_one(frame["weight"]) or (unknown and "depth_weight" not in one.run)
    if plain:  # a plain sum: weights of one all over tell nothing
        frame = frame.assign(weight=float("nan"), even=float("nan"))
    st.subheader("Which edges matter?" if plain else "Does the weight go to what matters?", anchor=False)
    legends = {"weight": "Weight (share of the read)", "value": f"Attribution ({unit})"}
    told = {
        "weight": findings.routing(frame.assign(depth_weight=frame["weight"], step=step), one.name),
        "value": f"{one.name}: {_peak(frame, unit)}",
    }
    columns = [name for name in legends if frame[name].notna().any()]
    align = "top" if plain else "bottom"
    places = st.columns(2, gap="medium", vertical_alignment=align)
    for name, place in zip(columns, places, strict=False):
        with place:
            chart = triangle(
                frame,
                name,
                told[name],
                cells.span(frame.loc[frame["sources"] > 2, name].to_numpy(float)),
                (_read(frame), None),
                legend=legends[name],
                told={each: legends[each] for each in columns},
            )
            draw.show(
                chart,
                key=f"causes {name} {one.name}",
                data=frame,
                fields=("number", "source"),
                on_click=lambda told: view.change(cause_read=_number(told)),
            )
    if plain:
        with places[1]:
            _bars(one, frame, unit)
            st.caption(PLAIN)
        return
    if "weight" not in columns:
        st.caption(
            "The weights were not recorded at this step, so there is nothing to compare the attribution with."
        )
        return
    _one_read(one, frame, unit)
    _compared(one, frame, unit)


def _number(told: dict) -> int | None:
    return int(told["number"]) if told.get("number") is not None else None


def _read(frame: pd.DataFrame) -> int:
    """The read looked at: the one somebody chose, else the last."""
    asked, last = view.current().cause_read, int(frame["number"].max())
    return asked if asked is not None and 1 <= asked <= last else last


def _one_read(one: room.Shown, frame: pd.DataFrame, unit: str) -> None:
    left, right = st.columns(2, gap="medium", vertical_alignment="bottom")
    with left:
        _bars(one, frame, unit)
    with right:
        known = causes.correlations(frame)
        if known["value"].notna().any():
            draw.show(
                agreement(known.dropna(subset=["value"]), verdicts.agreement(frame), height=330),
                key=f"agreement {one.name}",
                data=known,
            )


def _bars(one: room.Shown, frame: pd.DataFrame, unit: str) -> None:
    """One read: its sources by weight, as far as that tells them apart, and by effect."""
    number = _read(frame)
    reads = {int(n): str(read) for n, read in zip(frame["number"], frame["read"], strict=True)}
    key = "pick cause_read"
    if st.session_state.get(key) != number:
        st.session_state[key] = number
    st.selectbox(
        "Read",
        list(reads),
        key=key,
        format_func=lambda n: words.capital(reads[n]),
        on_change=lambda: view.change(cause_read=st.session_state[key]),
    )
    part = frame[frame["number"] == number].assign(short=lambda rows: rows["from"].map(words.short))
    top = {
        name: part.loc[part[name].abs().idxmax(), "from"]
        for name in ("weight", "value")
        if part[name].notna().any()
    }
    told = f"{words.capital(words.the(reads[number]))}"
    if "value" in top:
        told += f": {words.the(top['value'])} has the largest effect"
    if len(top) == 2:
        same = top["weight"] == top["value"]
        told = words.capital(words.the(reads[number])) + (
            f" gives {words.the(top['weight'])} most weight, and that has the largest effect too"
            if same
            else f" gives {words.the(top['weight'])} most weight; {words.the(top['value'])} has the largest effect"
        )
    draw.show(paired(part, unit, told), key=f"pair {one.name}", data=part)


def _compared(one: room.Shown, frame: pd.DataFrame, unit: str) -> None:
    odd = causes.disagreements(frame)
    wide = frame[frame["sources"] > 2].dropna(subset=["even", "value"])
    if wide.empty:
        return
    chart = scatter(wide, odd, unit, f"{one.name}: {verdicts.scatter_sentence(frame)}")
    draw.show(chart, key=f"scatter {one.name}", data=wide)


def _peak(frame: pd.DataFrame, unit: str) -> str:
    known = frame.dropna(subset=["value"])
    if known.empty:
        return "nothing was attributed"
    top = known.loc[known["value"].abs().idxmax()]
    return (
        f"the largest effect has {words.the(top['from'])} in {words.the(top['read'])}: "
        f"{top['value']:+.2g} {unit} without it"
    )


def _layers(one: room.Shown, found: Attribution) -> None:
    """Layers by effect, beside their share of the final state, and the ballast."""
    methods = causes.layer_methods(found)
    if not methods:
        return
    st.subheader("Which layers does the model need?", anchor=False)
    first = sorted(methods, key=lambda name: name != "removal")
    method = pick.choice("cause_layers", "Method for layers", {name: TITLES[name] for name in first})
    frame = causes.layers(found, method, one.run)
    order = frame.sort_values("value", ascending=False)["place"].tolist()
    left, right = st.columns(2, gap="medium", vertical_alignment="top")
    with left:
        label = f"{TITLES[method]} ({found.about.unit})"
        chart = ranked(frame, "value", label, order, f"{one.name}: {verdicts.needed(frame)}", error="error")
        draw.show(chart, key=f"needed {one.name}", data=frame)
    with right:
        if frame["share"].notna().any():
            top = frame.loc[frame["share"].idxmax()]
            told = f"{words.capital(str(top['place']))} is the largest part of the final state, {words.percent(top['share'])}"
            chart = ranked(frame, "share", "Share of the final state", order, told)
            draw.show(chart, key=f"shares {one.name}", data=frame)
        else:
            st.caption(
                "The layers’ shares of the final state are not known here (`mixing_share` was not recorded)."
            )
    st.markdown(words.plain(verdicts.ballast_sentence(found)))
    ballast = verdicts.ballast(found)
    if len(ballast):
        st.dataframe(_evidence(ballast, found), hide_index=True, width="stretch")


def _evidence(ballast: pd.DataFrame, found: Attribution) -> pd.DataFrame:
    unit = found.about.unit
    table = pd.DataFrame(
        {
            "Layer": ballast["place"],
            f"Effect ({unit})": ballast["value"].map(lambda x: f"{x:+.3g}"),
            "Two standard errors": (2 * ballast["error"]).map(lambda x: f"{x:.2g}"),
            "Over tokens": ballast["tokens"].map(lambda x: f"± {x:.2g}" if pd.notna(x) else "–"),
            "Share of the final state": ballast["share"].map(lambda x: f"{x:.1%}" if pd.notna(x) else "–"),
        }
    )
    for method in causes.layer_methods(found):
        if method == "removal":
            continue
        values = causes.layers(found, method)["value"]
        table[TITLES[method]] = [f"{values[index]:+.3g}" for index in ballast.index]
    return table


def _what_if(one: room.Shown, found: Attribution) -> None:
    kinds = [kind for kind in (LAYERS, EDGES) if kind in found.curves]
    if not kinds:
        return
    st.subheader("What if the least important were removed?", anchor=False)
    label = f"{words.capital(found.about.target)} ({found.about.unit})"
    for kind, place in zip(kinds, st.columns(2, gap="medium", vertical_alignment="bottom"), strict=False):
        frame = causes.curve_frame(found.curves[kind])
        with place:
            chart = removal(frame, kind, label, verdicts.guide(found.curves[kind], kind, found.about))
            draw.show(chart, key=f"without {kind} {one.name}", data=frame)


def _over_training(one: room.Shown, found: Attribution) -> None:
    series = causes.alike(found, one.run.attributions())
    if len(series) < 2:
        return
    st.subheader("How did that change over training?", anchor=False)
    left, right = st.columns(2, gap="medium", vertical_alignment="bottom")
    methods = causes.layer_methods(found)
    method = next((name for name in ("removal", *methods) if name in methods), "")
    frame = causes.layers_over_training(series, method)
    if len(frame):
        names = list(dict.fromkeys(frame["run"]))
        colours = dict(zip(names, palette.RUNS, strict=False))
        first, last = (
            frame[frame["step"] == step].set_index("run")["value"]
            for step in (frame["step"].min(), frame["step"].max())
        )
        top = last.abs().idxmax()
        told = f"{words.capital(top)}: {first.get(top, float('nan')):+.2g} at first, {last[top]:+.2g} at last"
        with left:
            chart = lines(frame, "value", f"{TITLES[method]} ({found.about.unit})", colours, told, zero=True)
            draw.show(chart, key=f"layers over training {one.name}", data=frame)
    edge_methods = causes.edge_methods(found)
    if edge_methods:
        name = "ablation" if "ablation" in edge_methods else edge_methods[0]
        course = causes.agreement_over_training(series, name)
        if len(course):
            with right:
                told = f"Rank correlation of weight and attribution: {course['value'].iloc[0]:.2f} at first, {course['value'].iloc[-1]:.2f} at last"
                chart = lines(
                    course, "value", "Rank correlation, median read", {"median read": one.colour}, told
                )
                draw.show(chart, key=f"agreement over training {one.name}", data=course)


room.enter(
    "Does the weight say what matters?",
    "The weight says where a layer reads; only taking a source away says what that does to the loss.",
    body,
)
