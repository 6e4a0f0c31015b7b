"""One read over depth: softmax over the logits of the sources, and the mix of the sources."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attnres.checks import check_count, check_not_negative, check_sources
from attnres.fused import fused_read
from attnres.linked import Link, plain, scored
from attnres.mixing import softmax_mix


class DepthAttention(nn.Module):
    """One read of AttnRes (Eq. 2-4): a learned query, a key norm's gain, a softmax over `depth_sources`.

    The query starts at zero, so that the first step weighs all sources alike. Both are bare parameters: an
    `apply(init)` over Linear and Embedding weights leaves them alone, and rules for matrices do not fit them.
    """

    def __init__(self, width: int, depth_sources: int, eps: float = 1e-6):
        super().__init__()
        check_count("width", width)
        check_count("depth_sources", depth_sources)
        check_not_negative("eps", eps)
        self.query = nn.Parameter(torch.zeros(width))
        self.gain = nn.Parameter(torch.ones(width))
        self.depth_sources = depth_sources
        self.eps = eps

    def effective_query(self) -> Tensor:
        """gain · query, [D]: all that the two parameters mean to the weights."""
        return self.gain * self.query

    def forward(
        self,
        sources: Sequence[Tensor],
        logits: Sequence[Tensor] | Sequence[Link] | None = None,
        mix: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The mix [B, T, D], always a new tensor in the embedding's dtype, and the weights [S, B, T].

        `sources` are S tensors [B, T, D], oldest first. A stream that has worked the logits out already
        gives them, S of [B, T] in float32 or float64, or its links (linked.py); one with another schedule gives all of the `mix`. Otherwise
        a fused kernel reads where there is one (fused.py), and its weights carry no gradient. ValueError where sources or
        logits do not fit the read or one another.
        """
        if mix is not None:
            return mix(sources)
        if logits is None:
            check_sources("sources", sources, len(self.query))
            if len(sources) != self.depth_sources:
                raise ValueError(
                    f"sources must be {self.depth_sources}, the depth_sources of this read, and there are {len(sources)}."
                )
            fused = fused_read(sources)
            if fused is not None:
                return fused(sources, self.query, self.gain, self.eps)
            query = self.effective_query().unsqueeze(0)
            mixed = sources[0].dtype
            logits = [scored(source, query, self.eps, mixed)[0] for source in sources]
        elif len(logits) != len(sources) or plain(logits)[0].shape != sources[0].shape[:-1]:
            raise ValueError(f"logits must be {len(sources)} tensors [B, T], one for each source.")
        return softmax_mix(sources, logits)

    def get_extra_state(self) -> Tensor:
        """The number of sources, kept with the weights: Full and Block have the same parameters otherwise."""
        return torch.tensor(self.depth_sources)

    def set_extra_state(self, state: Tensor) -> None:
        """ValueError where the state dict belongs to a read over another number of sources."""
        if not state.is_meta and int(state) != self.depth_sources:
            raise ValueError(
                f"This read attends over {self.depth_sources} sources, and the state dict's over {int(state)}: it was "
                "saved from a model with another residual or layers_per_block. Build the model as that one was built."
            )

    def extra_repr(self) -> str:
        return f"width={len(self.query)}, depth_sources={self.depth_sources}, eps={self.eps}"
