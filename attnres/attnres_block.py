"""A transformer block in the paper's form (Fig. 2): sublayers of one's own, with a depth read before each."""

from torch import Tensor, nn

from attnres.checks import check_called, check_count, check_output, described
from attnres.depth_attention import DepthAttention
from attnres.residual import block_sources


class AttnResBlock(nn.Module):
    """Attention and MLP of transformer block `index` (from 0), each with its pre-norm and its depth read.

    It takes and returns the finished depth blocks and the running partial sum, and changes neither in place:

        blocks, partial = [], embedding
        for block in transformer_blocks:
            blocks, partial = block(blocks, partial)
        state, _ = final_read([*blocks, partial])       # then the final norm

    with `final_read = AttnResBlock.final_read(width, layers, layers_per_block)`. `layers_per_block` counts sublayers,
    two for each transformer block; 1 is Full AttnRes. ValueError where a number cannot be, and in a forward where
    blocks are missing.
    """

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: nn.Module,
        mlp_norm: nn.Module,
        mlp: nn.Module,
        *,
        width: int,
        index: int,
        layers_per_block: int,
        eps: float = 1e-6,
    ):
        super().__init__()
        check_called(attention_norm=attention_norm, attention=attention, mlp_norm=mlp_norm, mlp=mlp)
        check_count("width", width)
        check_count("layers_per_block", layers_per_block)
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise ValueError(
                f"index must be 0 for the first transformer block, 1 for the next; not {index!r}."
            )
        written = 2 * index
        self.layers_per_block = layers_per_block
        self.index = index
        self.attention_read = DepthAttention(width, block_sources(written, layers_per_block), eps)
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_read = DepthAttention(width, block_sources(written + 1, layers_per_block), eps)
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    @staticmethod
    def final_read(width: int, layers: int, layers_per_block: int, eps: float = 1e-6) -> DepthAttention:
        """The read before the final norm of a model of `layers` layers."""
        check_count("layers", layers)
        check_count("layers_per_block", layers_per_block)
        return DepthAttention(width, block_sources(layers, layers_per_block), eps)

    def forward(self, blocks: list[Tensor], partial: Tensor, **options) -> tuple[list[Tensor], Tensor]:
        """The depth blocks and the partial sum after this transformer block; `options` go to the attention."""
        written = 2 * self.index
        finished = self.attention_read.depth_sources - 1
        if not isinstance(blocks, list | tuple):
            raise ValueError(
                f"blocks must be a list of tensors [B, T, D], empty at first, not {described(blocks)}."
            )
        if len(blocks) != finished:
            raise ValueError(
                f"AttnResBlock {self.index} reads {finished} finished depth blocks and a partial sum, and was given "
                f"{len(blocks)}: hand it the blocks that the one before returned."
            )
        state, _ = self.attention_read([*blocks, partial])
        output = self.attention(self.attention_norm(state), **options)
        blocks, partial = self._write(written, blocks, partial, output)
        state, _ = self.mlp_read([*blocks, partial])
        return self._write(written + 1, blocks, partial, self.mlp(self.mlp_norm(state)))

    def _write(
        self, written: int, blocks: list[Tensor], partial: Tensor, output: Tensor | tuple
    ) -> tuple[list[Tensor], Tensor]:
        """After `written` layers comes one more: it joins the partial sum, or begins a depth block."""
        # Attention of many libraries returns its weights too.
        output = output[0] if isinstance(output, tuple) else output
        check_output(written + 1, None, output, partial)
        if written % self.layers_per_block == 0:
            # A sum is kept in the embedding's dtype, whatever autocast makes of outputs.
            begun = output if self.layers_per_block == 1 else output.to(partial.dtype)
            return [*blocks, partial], begun
        return blocks, partial + output
