"""Explained: every metric as a definition, an equation and how to read it, so that nobody has to leave the page.

Definitions are the vocabulary's. Symbols: h_l the state that layer l receives, h_(L+1) the final state, v_0 the
embedding, v_i the output of layer i, α the depth weights of a read, ℓ the loss, B·T tokens of D channels.
"""

from app import words
from app.derived import FINAL_SHARE, metric

SYMBOLS = (
    "Symbols: $h_l$ is the state that layer $l$ receives and $h_{L+1}$ the final state, $v_0$ the embedding and $v_i$ the "
    "output of layer $i$, $\\alpha_{l,i}$ the weight of source $i$ in the read of layer $l$, $\\ell$ the loss, $D$ the "
    "number of channels; $\\langle\\cdot\\rangle_t$ is the mean over tokens."
)

# Equation and how to read it.
TOLD: dict[str, tuple[str, str]] = {
    "hidden_rms": (
        r"\sqrt{\langle \lVert h_l \rVert^2 / D \rangle_t}",
        "A line that climbs with depth is PreNorm dilution: each layer adds to an ever larger state. Level, or a saw "
        "that falls back at each depth block, is what AttnRes is for.",
    ),
    "output_rms": (
        r"\sqrt{\langle \lVert v_i \rVert^2 / D \rangle_t}",
        "Compare with the state it is added to. Outputs that grow with depth shout against the stream; an output near "
        "zero is a layer that does nothing.",
    ),
    "block_rms": (
        r"\sqrt{\langle \lVert b \rVert^2 / D \rangle_t}",
        "The paper’s Fig. 5b: a climb for a plain residual, a saw with the period of the depth blocks for Block AttnRes.",
    ),
    "output_grad_rms": (
        r"\sqrt{\langle \lVert \partial \ell / \partial v_i \rVert^2 / D \rangle_t}",
        "How much the loss still asks of each layer. Level is good; a steep fall with depth means that early layers learn "
        "at another pace than late ones. The one gradient that may be compared between residual types.",
    ),
    "hidden_grad_rms": (
        r"\sqrt{\langle \lVert \partial \ell / \partial h_l \rVert^2 / D \rangle_t}",
        "Only within a run, or between runs of one residual type: a PreNorm state carries every later path, an AttnRes "
        "state is read once.",
    ),
    "block_grad_rms": (
        r"\sqrt{\langle \lVert \partial \ell / \partial b \rVert^2 / D \rangle_t}",
        "The paper’s Fig. 5c. The same caution as with states: compare within a residual type.",
    ),
    "param_grad_norm": (
        r"\lVert \partial \ell / \partial \theta_l \rVert_2",
        "A layer that stays far below its neighbours learns hardly anything; a spike in one layer is where a training "
        "becomes unstable first.",
    ),
    "param_norm": (
        r"\lVert \theta_l \rVert_2",
        "Slow growth is usual; beside the gradient norm it gives the update ratio.",
    ),
    "update_ratio": (
        r"\lVert \theta_l' - \theta_l \rVert_2 / \lVert \theta_l \rVert_2",
        "About 0.001 is usual with Adam; far above, the layer is thrown about, far below it stands still. Level over depth "
        "means that all layers move at one pace.",
    ),
    "depth_weight": (
        r"\alpha_{l,i} = \langle \mathrm{softmax}_i(q_l \cdot \mathrm{RMSNorm}(v_i)) \rangle_t",
        "A dark diagonal reads its neighbour, a dark column is a sink that everybody reads, a pale column is ballast. An "
        "even average gives each of k sources 1/k.",
    ),
    "depth_weight_std": (
        r"\mathrm{std}_t(\alpha_{l,i})",
        "Near zero the weight is the same for every token: a fixed skip connection. Large means that the read depends on "
        "the input.",
    ),
    "token_depth_weight": (
        r"\alpha_{l,i,t} = \mathrm{softmax}_i(q_l \cdot \mathrm{RMSNorm}(v_{i,t}))",
        "One colour all along means that the read is the same for every token: a fixed skip connection. Where it changes "
        "from word to word, the layer chooses by what it has before it.",
    ),
    "contribution_rms": (
        r"\sqrt{\langle \lVert \alpha_{l,i} v_i \rVert^2 / D \rangle_t}",
        "What really arrives: a large weight on a tiny source adds little. Compare a row’s cells with each other.",
    ),
    "depth_entropy": (
        r"\langle -\textstyle\sum_i \alpha_{l,i} \ln \alpha_{l,i} \rangle_t / \ln k",
        "1 is an even average over the k sources, 0 a single source. It starts at 1 with zero queries and falls as reads "
        "make up their mind.",
    ),
    "depth_entropy_of_mean": (
        r"-\textstyle\sum_i \langle\alpha_{l,i}\rangle_t \ln \langle\alpha_{l,i}\rangle_t / \ln k",
        "Never below the depth entropy. Where it is much larger, tokens choose differently from each other.",
    ),
    "query_norm": (r"\lVert g \odot q_l \rVert_2", "Zero is an even average; it grows as the read sharpens."),
    "mixing_weight": (
        r"a_l = \arg\min_a \lVert h_l - \textstyle\sum_i a_i v_i \rVert^2 \;\text{per token, mean over tokens}",
        "The same picture for any architecture: all ones in a plain residual, the depth weights in Full AttnRes. Striped "
        "cells could not be told apart from the tokens sampled, or their state holds more than a mix of the sources.",
    ),
    "mixing_share": (
        r"a_{l,i}\,\langle v_i, h_l \rangle / \lVert h_l \rVert^2",
        "What a state is made of; a row sums to one. In a plain residual with dilution late sources get ever smaller "
        "shares. A negative share works against the state.",
    ),
    FINAL_SHARE: (
        r"a_{L+1,i}\,\langle v_i, h_{L+1} \rangle / \lVert h_{L+1} \rVert^2",
        "A layer near zero hardly reaches the output directly; one peak means that a single layer speaks for all.",
    ),
    "mixing_r2": (
        r"1 - \lVert h_l - \textstyle\sum_i a_i v_i \rVert^2 / \lVert h_l \rVert^2",
        "Near 1 the sources explain the state and the row can be believed.",
    ),
    "mixing_condition": (
        "",
        "Large where two sources look alike: their weights can then be exchanged without changing the state.",
    ),
    "depth_attribution": (
        r"-\textstyle\sum_t \alpha_{l,i}\,\langle v_i, \partial \ell / \partial h_l \rangle",
        "To first order: how the loss would change without that source in that read. Positive helps. A source with much "
        "weight and nothing here is read and not used. Behind a norm a row sums to about zero, so it has no shares.",
    ),
    "hidden_max": (
        r"\max_{t,d} \lvert h_{l,t,d} \rvert",
        "Massive activations show as one value far above the RMS. Of a sample of tokens: that of all may be larger.",
    ),
    "hidden_kurtosis": (
        r"\langle h_{l,d}^4 \rangle_{t,d} / \langle h_{l,d}^2 \rangle_{t,d}^2",
        "3 for normal values; a climb means that few channels hold ever more of the state.",
    ),
    "output_cosine": (
        r"\langle \cos(h_l, v_l) \rangle_t",
        "Above zero a layer strengthens the stream it reads, below zero it erases some of it.",
    ),
    "expert_load": (
        r"n_{l,e} / \textstyle\sum_{e'} n_{l,e'}",
        "An even row gives each of E experts 1/E. A dark cell is an expert that is asked too much, a pale row end are "
        "experts that hardly learn.",
    ),
    "expert_balance": (
        r"-\textstyle\sum_e p_{l,e} \ln p_{l,e} / \ln E",
        "1 is an even load. A layer that falls away from the others is where routing collapses.",
    ),
    "nonfinite": ("", "Anything above zero is the beginning of the end: look where it starts."),
    "read_error": (
        "",
        "Near zero where the weights shown are those the model used; more, and the read’s weights are left out.",
    ),
    "identity_error": (
        "",
        "Near zero for a plain residual; of the order of one where the stream is mixed otherwise.",
    ),
}


def told(name: str) -> str:
    """Markdown: title, definition, equation and how to read a metric."""
    row = metric(name)
    unit = f", in {row.unit}" if row.unit else ""
    equation, reading = TOLD.get(name, ("", ""))
    parts = [f"**{row.title}** (`{name}`{unit}). {words.plain(row.meaning)}"]
    if equation:
        parts.append(f"$\\displaystyle {equation}$")
    if reading:
        parts.append(f":gray[*How to read it.* {words.plain(reading)}]")
    return "  \n".join(parts)
