"""Tokens: which tokens make a layer read what it reads?"""

import numpy as np
import streamlit as st

from app import cells, draw, findings, over_depth, pick, room, token_reads, view, words
from app.charts import tokens as charts
from app.charts.triangle import triangle
from probes import RunError
from probes.tokens import Tokens
from probes.vocabulary import TOKEN_WEIGHT

CONTRASTS = (
    "The reads whose weight on one source differs most between the tokens of this sequence. Click one to see it token by "
    "token."
)
SEQUENCES = {1: "First", 2: "Second"}


def body(shown: list[room.Shown]) -> None:
    have = [one for one in shown if len(one.run.token_steps)]
    if have:
        _followed(have)
    _without(shown, have)
    if shown:
        room.explain([TOKEN_WEIGHT.name, "depth_weight_std"])


def _followed(have: list[room.Shown]) -> None:
    picture, (player, *places), below = st.container(), pick.bar(4, 4), st.container()
    choices = below.columns([1, 1, 2], gap="medium")
    names = [one.name for one in have]
    now = view.current().focus if view.current().focus in names else names[0]
    if len(have) > 1:
        pick.listed("token run", "Run", {name: name for name in names}, now, _of_run, choices[1])
    one = next(one for one in have if one.name == now)
    step = pick.at([int(each) for each in one.run.token_steps], player)
    try:
        told, last = (token_reads.snapshot(one.run, at) for at in (step, one.run.last_step))
    except (RunError, KeyError) as error:
        picture.warning(words.plain(str(error.args[0])), icon=":material/warning:")
        return
    sequence = min(view.current().sequence or 1, len(told.weight)) - 1
    if len(told.weight) > 1:
        pick.one("sequence", "Sequence", SEQUENCES, where=choices[0])
    read, source, token = _focus(one, last, sequence)
    reads = {i: f"{words.capital(each.label)}" for i, each in enumerate(one.run.reads, 1)}
    pick.listed("token read", "Read", reads, read, lambda told: _look(one, told, source), places[0])
    there = one.run.sources[: one.run.reads[read - 1].sources]
    sources = {i: words.capital(each.label) for i, each in enumerate(there)}
    pick.listed("token source", "Source", sources, source, lambda told: _look(one, read, told), places[1])
    with picture:
        _text(one, told, sequence, read, source, token, step)
        _grid(one, told, sequence, read, source, token)
    with below:
        left, right = st.columns([9, 5], gap="medium")
        with right:
            _contrasts(one, told, sequence)
        with left:
            _triangle(one, told, sequence, read, source, token)


def _focus(one: room.Shown, last: Tokens, sequence: int) -> tuple[int, int, int | None]:
    """The read (from 1), the source (from 0) and the token (from 1) to look at: those clicked, here or on the page of
    depth attention, else the read and source whose tokens differ most at the last step, and the token that reads it most."""
    now = view.current()
    read, source = (now.read, now.source) if now.focus == one.name else (None, None)
    if read is None or not 1 <= read <= len(one.run.reads):
        most = token_reads.contrasts(one.run, last, sequence, 1)
        read, source = (most[0].read, most[0].source) if most else (len(one.run.reads), 0)
    count = one.run.reads[read - 1].sources
    if source is None or source >= count:
        there = token_reads.real(last, sequence)
        spread = last.weight[sequence, there, read - 1, :count].std(axis=0)
        source = int(np.nan_to_num(spread).argmax()) if len(spread) else 0
    course = last.weight[sequence, :, read - 1, source]
    token = now.token or (int(np.nanargmax(course)) + 1 if np.isfinite(course).any() else None)
    return read, source, token


def _look(one: room.Shown, read: int, source: int | None) -> None:
    view.change(focus=one.name, read=read, source=source)


def _of_run(name: str) -> None:
    view.change(focus=name, read=None, source=None, token=None)


def _clicked(one: room.Shown, read: int, source: int, told: dict) -> None:
    """A token, or one of its cells, was clicked: look at it. A click beside them changes nothing."""
    if told.get("token") is not None:
        view.change(
            focus=one.name, read=read, source=int(told.get("source", source)), token=int(told["token"])
        )


def _text(
    one: room.Shown, told: Tokens, sequence: int, read: int, source: int, token: int | None, step: int
) -> None:
    """The sequence as text, coloured by the weight of the read on the source."""
    frame = token_reads.line(told, sequence, read, source)
    steps, values = token_reads.played(one.run, sequence, read, len(frame))
    course = values[:, :, source] if len(values) and source < values.shape[2] else frame["weight"].to_numpy()
    chart = charts.text(
        frame,
        _domain(course),
        findings.tokens(
            frame, one.name, one.run.reads[read - 1].label, one.run.sources[source].label, told.step
        ),
        token,
    )
    draw.show(
        chart,
        key=f"tokens {one.name}",
        data=frame,
        frames=draw.Frames(steps, {"weight": course.T}) if course.shape == (len(steps), len(frame)) else None,
        fields=("token",),
        on_click=lambda told: _clicked(one, read, source, told),
    )
    note = words.plain(over_depth.nearest({one.name: told.step}, step))
    if told.texts is None:
        what = "ids" if told.ids is not None else "places in the sequence"
        note += f" Tokens are shown as {what}: `probes.record(…, decode=…)` records their texts."
    if note:
        st.caption(note.strip())


def _domain(course: np.ndarray) -> tuple[float, float]:
    """Colours from zero, or from the lowest weight where that would leave them all alike."""
    known = course[np.isfinite(course)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    if low < 0.1 * high or high - low < 0.1:
        low = 0.0
    return low, high if high > low else low + 1.0


def _grid(one: room.Shown, told: Tokens, sequence: int, read: int, source: int, token: int | None) -> None:
    """Every source of the read, token by token."""
    frame = token_reads.grid(one.run, told, sequence, read)
    if frame.empty or one.run.reads[read - 1].sources < 2:
        return
    steps, values = token_reads.played(one.run, sequence, read, len(frame))
    fits = values.shape[1] * values.shape[2] == len(frame)
    written = token_reads.texts(told, sequence)
    chart = charts.grid(
        frame,
        [token_reads.seen(written[at]) for at in token_reads.real(told, sequence)],
        cells.span(values if fits else frame["weight"].to_numpy()),
        findings.token_sources(frame, one.run.reads[read - 1].label),
        (token, source),
    )
    draw.show(
        chart,
        key=f"token sources {one.name}",
        data=frame,
        frames=draw.Frames(steps, {"weight": values.reshape(len(steps), -1).T}) if fits else None,
        fields=("token", "source"),
        on_click=lambda told: _clicked(one, read, source, told),
    )


def _triangle(
    one: room.Shown, told: Tokens, sequence: int, read: int, source: int, token: int | None
) -> None:
    """Every read of the token that was clicked."""
    written = token_reads.texts(told, sequence)
    if token is None or token - 1 not in token_reads.real(told, sequence):
        return
    frame = token_reads.cells(one.run, told, sequence, token)
    label = f"{token_reads.quoted(written[token - 1])}, token {token},"
    wide = frame[frame["sources"] > 2] if (frame["sources"] > 2).any() else frame
    draw.show(
        triangle(
            frame,
            "depth_weight",
            findings.picture(frame, label, "depth_weight"),
            cells.span(wide["depth_weight"].to_numpy()),
            (read, source),
            told={"depth_weight": TOKEN_WEIGHT.title},
        ),
        key=f"token triangle {one.name}",
        data=frame,
        fields=("number", "source"),
        on_click=lambda told: told and _look(one, int(told["number"]), int(told["source"])),
    )


def _contrasts(one: room.Shown, told: Tokens, sequence: int) -> None:
    st.markdown("**Where tokens differ most**", help=CONTRASTS)
    found = token_reads.contrasts(one.run, told, sequence)
    if not found:
        st.caption("Every token reads the same: no weight depends on the token yet.")
        return
    with st.container(gap="xxsmall"):
        for each in found:
            st.button(
                words.plain(each.sentence(one.run)),
                key=f"contrast {one.name} {each.read} {each.source}",
                type="tertiary",
                on_click=_look,
                args=(one, each.read, each.source),
            )


def _without(shown: list[room.Shown], have: list[room.Shown]) -> None:
    """What to do for runs that follow no tokens."""
    lack = [one for one in shown if one not in have]
    if have or not lack:
        return
    able = any("depth_weight" in one.run for one in lack)
    young = all(one.run.status == "running" for one in lack)
    st.info(
        f"{words.joined(f'**{words.plain(one.name)}**' for one in lack)} recorded no single tokens{' yet' * young}."
        + ("" if able else " Only models with depth reads have weights to record token by token."),
        icon=":material/info:",
    )
    st.markdown("`tokens_every=` follows two sequences of the first batch through training:")
    st.code(
        "probes.record(model, path, optimizer=optimizer, tokens_every=1000, decode=decode)  # decode(ids) gives texts",
        language="python",
    )


room.enter(
    "What does each token read?",
    "Two sequences are followed through training: colour tells how much of a read comes from one source, token by token.",
    body,
)
