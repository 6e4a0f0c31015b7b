"""The words of a run: every metric's name, axes, unit and meaning.

This page crosses the disk: the writer, the reader, the charts and the docs take names from here and nowhere
else. It imports nothing.
"""

from dataclasses import dataclass

FORMAT_VERSION = 2
MOST_STEP = 10**15  # no training gets there, and every reader can count that far

# Axes. "layer" is one sublayer; a triangle axis pair is stored packed (see layout.py).
SCALAR: tuple[str, ...] = ()
STATE = ("state",)  # L+1: h_1..h_L and the final state
OUTPUT = ("output",)  # L+1: source 0 (embedding) and the output of each layer
BLOCK = ("transformer block",)  # B
LAYER = ("layer",)  # L
READ = ("read",)  # R = L+1
TRIANGLE = ("read", "source")  # R x S
EXPERTS = (*LAYER, "expert")  # L x E, the most experts of any layer
MIXING = (*STATE, *OUTPUT)  # (L+1) x (L+1), a triangle too
TRIANGLES = (TRIANGLE, MIXING)


@dataclass(frozen=True)
class Metric:
    """One measured quantity: `axes` name the shape of one recorded step, `title` is its axis title."""

    name: str
    axes: tuple[str, ...]
    title: str
    unit: str
    meaning: str


_ROWS = [
    Metric(
        "hidden_rms",
        STATE,
        "Hidden-state RMS",
        "activation units",
        "RMS over tokens and channels of the state h_l that each layer's pre-norm receives, and of the final "
        "state.",
    ),
    Metric(
        "output_rms",
        OUTPUT,
        "Output RMS",
        "activation units",
        "RMS over tokens and channels of each source: the embedding and what each layer adds to the stream.",
    ),
    Metric(
        "block_rms",
        BLOCK,
        "Transformer-block output RMS",
        "activation units",
        "RMS of what leaves each transformer block: the cumulative stream of a plain residual, the running "
        "partial sum of Block AttnRes, the MLP's own output of Full AttnRes (paper, Fig. 5b).",
    ),
    Metric(
        "output_grad_rms",
        OUTPUT,
        "Output gradient RMS",
        "loss per activation unit",
        "RMS of the loss gradient with respect to each source. It means the same in every architecture, so "
        "gradient claims use it.",
    ),
    Metric(
        "hidden_grad_rms",
        STATE,
        "State gradient RMS",
        "loss per activation unit",
        "RMS of the loss gradient with respect to each state. Not comparable between residual types: the "
        "state of a plain residual carries every later path, an AttnRes state is read once.",
    ),
    Metric(
        "block_grad_rms",
        BLOCK,
        "Transformer-block gradient RMS",
        "loss per activation unit",
        "RMS of the loss gradient at the place of block_rms. Not comparable between residual types.",
    ),
    Metric(
        "param_grad_norm",
        LAYER,
        "Parameter gradient norm",
        "L2",
        "L2 norm of the gradient over a layer's parameters (sublayer, its norms, its gate and its depth query), "
        "accumulated over micro-batches and before clipping.",
    ),
    Metric(
        "param_norm",
        LAYER,
        "Parameter norm",
        "L2",
        "L2 norm of a layer's parameters (sublayer, its norms, its gate and its depth query) before the update. "
        "Recorded with the matrices.",
    ),
    Metric(
        "update_ratio",
        LAYER,
        "Update ratio (estimate)",
        "",
        "L2 norm of what the optimizer's step changed in a layer's parameters, over their L2 norm before it. An estimate "
        "from a fixed sample of about 4,096 of each layer's elements.",
    ),
    Metric(
        "other_grad_norm",
        SCALAR,
        "Other gradient norm",
        "L2",
        "L2 norm of the gradient over all parameters of no layer: embedding, head, final norm, final read.",
    ),
    Metric(
        "depth_weight",
        TRIANGLE,
        "Depth weight",
        "share of the read",
        "Mean over tokens of the softmax weight each read gives to each source (paper, Eq. 2-6). A row sums "
        "to one.",
    ),
    Metric(
        "depth_weight_std",
        TRIANGLE,
        "Spread of the depth weight",
        "standard deviation over tokens",
        "Standard deviation over tokens of the depth weight: near zero means the same skip for every token.",
    ),
    Metric(
        "contribution_rms",
        TRIANGLE,
        "Contribution RMS",
        "activation units",
        "RMS of weight times source: a large weight on a small source adds little.",
    ),
    Metric(
        "depth_attribution",
        TRIANGLE,
        "Depth attribution",
        "loss",
        "First-order change of the loss without that source in that read: −⟨∂ℓ/∂h, w·v⟩ summed over tokens, the other "
        "weights as they are. Above zero the source helps. In a plain residual the read is the layer's branch alone, "
        "through its norm. Behind a norm a row sums to about zero.",
    ),
    Metric(
        "depth_entropy",
        READ,
        "Depth entropy",
        "share of the maximum",
        "Mean over tokens of the entropy of a read's weights divided by ln(number of sources): 1 is an even "
        "average, 0 a single source.",
    ),
    Metric(
        "depth_entropy_of_mean",
        READ,
        "Entropy of the mean weights",
        "share of the maximum",
        "Entropy of a read's token-averaged weights divided by ln(number of sources): all that a published "
        "heatmap of mean weights can be compared with.",
    ),
    Metric(
        "query_norm",
        READ,
        "Depth query norm",
        "L2",
        "L2 norm of the effective depth query, gain times query. Zero gives an even average.",
    ),
    Metric(
        "read_error",
        READ,
        "Depth read error",
        "relative",
        "How far weights times sources are from the state on a few tokens, where the reads of a model are found by "
        "themselves: rounding. A read for which it is more has no weights.",
    ),
    Metric(
        "identity_error",
        STATE,
        "Residual identity error",
        "relative",
        "How far each state is from the embedding plus the outputs before it, on a sample of tokens: zero but for rounding "
        "in a plain residual, of the order of one where the stream is mixed otherwise.",
    ),
    Metric(
        "mixing_weight",
        MIXING,
        "Recovered mixing weight",
        "",
        "Weight of each source in each state, solved by least squares on a sample of tokens, mean over them; any "
        "architecture, a plain residual has ones. Blank where the sources exceed a quarter of the width, or where "
        "rounding could move the weight by more than 1e-4 (in 16 bits 2e-2), for its source is tiny or the condition bad, or "
        "where the sources do not make up the state.",
    ),
    Metric(
        "mixing_share",
        MIXING,
        "Share of the state",
        "share of the state",
        "Part of each state that each source makes up: a_i⟨v_i, h⟩/‖h‖² with the recovered weight a_i, mean over "
        "tokens. A row sums to mixing_r2, to one where the sources explain the state; a share may be negative.",
    ),
    Metric(
        "mixing_r2",
        STATE,
        "Explained by the sources",
        "share of the state",
        "How far to believe a row of mixing_weight: one minus the squared distance of the state from its mix, relative "
        "to the state's square, mean over tokens. It proves nothing where the condition is bad.",
    ),
    Metric(
        "mixing_condition",
        STATE,
        "Condition of the sources",
        "",
        "By how much the likeness of a state's sources magnifies errors of their weights: the condition number of the "
        "sources scaled to one length, in Frobenius norms divided by their number, median over tokens. One where they "
        "are at right angles.",
    ),
    Metric(
        "hidden_max",
        STATE,
        "Largest value of the state",
        "activation units",
        "Largest absolute value of each state in a sample of tokens, an estimate from below of that of all.",
    ),
    Metric(
        "hidden_kurtosis",
        STATE,
        "Kurtosis of the state",
        "",
        "Mean fourth power over squared mean square of each state, over channels and a sample of tokens: 3 for normal "
        "values, as many as there are channels where one holds everything.",
    ),
    Metric(
        "output_cosine",
        LAYER,
        "Cosine of output and state",
        "",
        "Cosine between what each layer receives and what it makes of it, mean over a sample of tokens: in a plain "
        "residual, whether it writes along the stream or against it.",
    ),
    Metric(
        "nonfinite",
        STATE,
        "Non-finite values",
        "values",
        "Number of infinite and not-a-number values in each state. Counted with the matrices.",
    ),
    Metric(
        "expert_load",
        EXPERTS,
        "Expert load",
        "share of the assignments",
        "Share of the tokens of a layer with a mixture of experts that its router sends to each expert; a token sent to "
        "k experts counts k times. Blank for layers without experts. Counted with the matrices. Where each expert is a "
        "module of its own nobody knows which of its tokens are padding: all count.",
    ),
    Metric(
        "expert_balance",
        LAYER,
        "Expert balance",
        "share of the maximum",
        "Entropy of a layer's expert load divided by ln(number of experts): 1 where all experts get as many tokens, 0 "
        "where one gets all.",
    ),
    Metric("loss", SCALAR, "Training loss", "nats per token", "The training loss as logged."),
    Metric("val_loss", SCALAR, "Validation loss", "nats per token", "The validation loss as logged."),
    Metric("lr", SCALAR, "Learning rate", "", "Learning rate of the optimizer's first parameter group."),
    Metric(
        "grad_norm",
        SCALAR,
        "Gradient norm",
        "L2",
        "L2 norm of the gradient over all parameters, accumulated over micro-batches and before clipping.",
    ),
    Metric(
        "clip_factor",
        SCALAR,
        "Clip factor",
        "",
        "What the script multiplied the gradient norm by between backward and the optimizer, as clipping does: 1 "
        "when it left it alone. Absent where backward runs inside the optimizer's step, or nobody shows it.",
    ),
    Metric(
        "skipped",
        SCALAR,
        "Skipped attempts",
        "attempts",
        "Attempts at this step that the loss scaler skipped because gradients were not finite.",
    ),
    Metric(
        "wall_time",
        SCALAR,
        "Wall time",
        "s",
        "Seconds of recording up to the end of the step. Time between attempts does not count, nor do steps that were "
        "trained again.",
    ),
    Metric("tokens", SCALAR, "Training tokens", "tokens", "Training tokens seen so far, as logged."),
    Metric("step_time", SCALAR, "Step time", "s", "Wall time from one optimizer step to the next."),
    Metric(
        "probe_time",
        SCALAR,
        "Probe time",
        "s",
        "Host time spent inside the taps in one step; blank where the model is compiled.",
    ),
]

# Recorded apart, a file for each snapshot (tokens.py): of two sequences that are followed, up to 128 tokens.
TOKEN_WEIGHT = Metric(
    "token_depth_weight",
    ("sequence", "token", *TRIANGLE),
    "Depth weight of a token",
    "share of the read",
    "Weight each read gives to each source for one token of a sequence that is followed through training.",
)

METRICS: dict[str, Metric] = {row.name: row for row in _ROWS}

# What a training logs, and what a host measures: of one process, where several train one model.
OF_ONE = ("loss", "val_loss", "lr", "skipped", "wall_time", "tokens", "step_time", "probe_time")

# All that is known of gradients, in the loss's own scale.
GRADIENTS = (
    "output_grad_rms",
    "hidden_grad_rms",
    "block_grad_rms",
    "param_grad_norm",
    "other_grad_norm",
    "grad_norm",
    "clip_factor",
    "depth_attribution",
)


def metric(name: str) -> Metric:
    """The entry of a metric; a name that is not in the vocabulary is a scalar somebody logged."""
    return METRICS.get(name) or Metric(name, SCALAR, name, "", "Logged by the training script.")
