"""What cannot be, at every public entry point: one sentence that begins with what is wrong and ends in a full stop."""

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import attnres
from attnres import (
    AttnResBlock,
    Block,
    Corpus,
    Decoder,
    DecoderConfig,
    DeepNorm,
    DepthAttention,
    Full,
    PostNorm,
    PreNorm,
    Rescaled,
    Training,
    TrainingConfig,
    block_attn_res,
    convert,
    full_attn_res,
    generate,
    revert,
)
from tests.attnres.families import DiT, dit_inputs

NAN, INFINITE = float("nan"), float("inf")
TOKENS = torch.zeros(1, 3, dtype=torch.long)
X = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0))
PROJ, NORM, SAME = nn.Linear(4, 1, bias=False), nn.RMSNorm(4), nn.Identity()
CORPUS = Corpus("letters", {"a": b"abc" * 1000, "b": b"abc" * 100})


class Narrowing(nn.Module):
    def forward(self, x):
        return x[..., :2]


def config(**changes):
    return DecoderConfig(**{"width": 16, "blocks": 2, "heads": 2, "context": 16} | changes)


def decoder(**changes):
    return Decoder(config(**changes))


def block(*parts, **changes):
    parts = parts or (SAME, SAME, SAME, SAME)
    return AttnResBlock(*parts, **{"width": 4, "index": 0, "layers_per_block": 2} | changes)


def training(**changes):
    return Training(config(), TrainingConfig(**{"context": 8, "batch": 1} | changes), CORPUS)


def loaded(mine, theirs):
    decoder(**mine).load_state_dict(decoder(**theirs).state_dict())


def written(residual, layers):
    stream = residual.open(X)
    for _ in range(layers):
        stream.read()
        stream.write(X)


def dit(residual="full", layers_per_block=None, **more):
    return convert(DiT(depth=2), residual, layers_per_block, **{"example": dit_inputs()} | more)


WRONG = {
    DecoderConfig: [
        ("vocabulary must", lambda: config(vocabulary=None)),
        ("width must", lambda: config(width="16")),
        ("width must", lambda: config(width=18)),
        ("blocks must", lambda: config(blocks=0)),
        ("heads must", lambda: config(heads=2.0)),
        ("kv_heads must", lambda: config(kv_heads=3)),
        ("mlp_width must", lambda: config(mlp_width=0)),
        ("context must", lambda: config(context=True)),
        ("norm_eps must", lambda: config(norm_eps="x")),
        ("norm_eps must", lambda: config(norm_eps=NAN)),
        ("norm_eps must", lambda: config(norm_eps=0.0)),
        ("rope_base must", lambda: config(rope_base=INFINITE)),
        ("residual must", lambda: config(residual=["full"])),
        ("layers_per_block must", lambda: config(residual="block")),
        ("layers_per_block must", lambda: config(residual="block", layers_per_block=0)),
        ("layers_per_block is for", lambda: config(layers_per_block=2)),
    ],
    Decoder: [
        ("config must be a DecoderConfig", lambda: Decoder({"width": 16})),
        ("tokens must be an integer tensor", lambda: decoder()(TOKENS[0])),
        ("tokens must be an integer tensor", lambda: decoder()(TOKENS.float())),
        ("tokens must be an integer tensor", lambda: decoder()([[1, 2]])),
        ("The input has 17 tokens, and the context is 16", lambda: decoder()(TOKENS.new_zeros(1, 17))),
        ("tokens must be from 0 to 255", lambda: decoder()(TOKENS + 256)),
        ("tokens must be from 0 to 255", lambda: decoder()(TOKENS - 1)),
        ("residual is prenorm, and the state dict", lambda: loaded({}, {"residual": "full"})),
        ("residual is full, and the state dict", lambda: loaded({"residual": "full"}, {})),
        (
            "blocks is 2, and the state dict",
            lambda: loaded({"residual": "full"}, {"residual": "full", "blocks": 3}),
        ),
        *(
            (
                f"residual is {mine}, and the state dict was saved from a decoder with {theirs}",
                partial(loaded, {"residual": mine}, {"residual": theirs}),
            )
            for mine, theirs in itertools.permutations(("prenorm", "postnorm", "deepnorm", "rescaled"), 2)
        ),
        ("width is 16, and the state dict", lambda: loaded({}, {"width": 32})),
        ("vocabulary is 256, and the state dict", lambda: loaded({}, {"vocabulary": 300})),
        (
            "This read attends over",
            lambda: loaded({"residual": "full"}, {"residual": "block", "layers_per_block": 2}),
        ),
    ],
    generate: [
        ("model must be a Decoder", lambda: generate(nn.Linear(2, 2), TOKENS, 2)),
        ("tokens must be an integer tensor", lambda: generate(decoder(), TOKENS[0], 2)),
        ("tokens must be an integer tensor", lambda: generate(decoder(), [1, 2], 2)),
        ("tokens must be an integer tensor", lambda: generate(decoder(), TOKENS.float(), 2)),
        ("tokens must be from 0 to 255", lambda: generate(decoder(), TOKENS + 300, 2)),
        ("new_tokens must", lambda: generate(decoder(), TOKENS, "5")),
        ("new_tokens must", lambda: generate(decoder(), TOKENS, 0)),
        ("new_tokens: 3 tokens and 14 more", lambda: generate(decoder(), TOKENS, 14)),
        ("new_tokens: 0 tokens and 2 more", lambda: generate(decoder(), TOKENS[:, :0], 2)),
        *(
            (
                "temperature must be a number of at least 0",
                partial(generate, decoder(), TOKENS, 2, temperature=wrong),
            )
            for wrong in ("hot", -1.0, NAN)
        ),
        ("top_k must", lambda: generate(decoder(), TOKENS, 2, top_k=2.0)),
        ("top_k must", lambda: generate(decoder(), TOKENS, 2, top_k=0)),
        ("generator must", lambda: generate(decoder(), TOKENS, 2, temperature=1.0, generator=5)),
    ],
    DepthAttention: [
        ("width must", lambda: DepthAttention(0, -1)),
        ("depth_sources must", lambda: DepthAttention(4, -1)),
        ("eps must", lambda: DepthAttention(4, 1, "x")),
        ("sources must be a list", lambda: DepthAttention(4, 2)(None)),
        ("sources must hold at least the embedding", lambda: DepthAttention(4, 2)([])),
        ("sources must have the width 5", lambda: DepthAttention(5, 2)([X, X])),
        ("sources must have one shape", lambda: DepthAttention(4, 2)([X, X[:, :1]])),
        ("sources must be floating-point", lambda: DepthAttention(4, 2)([X.long()])),
        ("sources must be floating-point", lambda: DepthAttention(4, 2)(X)),
        ("sources must be 2, the depth_sources", lambda: DepthAttention(4, 2)([X, X, X])),
        ("logits must be 2 tensors", lambda: DepthAttention(4, 2)([X, X], torch.zeros(3, 1, 2))),
    ],
    full_attn_res: [
        ("sources must be a list", lambda: full_attn_res(None, PROJ, NORM)),
        ("sources must hold", lambda: full_attn_res([], PROJ, NORM)),
        ("sources must be floating-point", lambda: full_attn_res(X, PROJ, NORM)),
        ("proj must be Linear", lambda: full_attn_res([X], PROJ.weight, NORM)),
        ("proj must be Linear", lambda: full_attn_res([X], nn.Linear(4, 2, bias=False), NORM)),
        ("proj must be Linear", lambda: full_attn_res([X], nn.Linear(4, 1), NORM)),
        ("sources must have one shape", lambda: full_attn_res([X, X[:, :1]], PROJ, NORM)),
        ("norm must be a module", lambda: full_attn_res([X], PROJ, None)),
    ],
    block_attn_res: [
        ("blocks must be a list", lambda: block_attn_res(None, X, PROJ, NORM)),
        ("blocks and partial_block must hold", lambda: block_attn_res([], None, PROJ, NORM)),
        ("blocks and partial_block must have one shape", lambda: block_attn_res([X], X[:, :1], PROJ, NORM)),
        (
            "blocks and partial_block must be floating-point",
            lambda: block_attn_res([X.long()], X, PROJ, NORM),
        ),
        ("proj must be Linear", lambda: block_attn_res([X], None, None, NORM)),
        ("proj must be Linear", lambda: block_attn_res([X], None, NORM, PROJ)),
        ("proj must be Linear", lambda: block_attn_res([X], None, nn.Linear(5, 1, bias=False), NORM)),
        ("norm must normalise 4 channels", lambda: block_attn_res([X], None, PROJ, nn.RMSNorm(5))),
        ("norm must normalise 4 channels", lambda: block_attn_res([X], None, PROJ, nn.LayerNorm(5))),
        ("norm must keep the shape", lambda: block_attn_res([X], None, PROJ, Narrowing())),
    ],
    AttnResBlock: [
        ("attention_norm must be a module", lambda: block("norm", SAME, SAME, SAME)),
        ("layers_per_block must", lambda: block(layers_per_block=0)),
        ("index must", lambda: block(index=True)),
        ("index must", lambda: block(index=-1)),
        ("width must", lambda: block(width=0)),
        ("eps must", lambda: block(eps="x")),
        ("blocks must be a list", lambda: block()(None, X)),
        ("AttnResBlock 1 reads 1 finished", lambda: block(index=1)([], X)),
        ("sources must be floating-point", lambda: block()([], None)),
        ("sources must have the width 4", lambda: block()([], X[..., :2])),
        ("Layer 1 must give an output", lambda: block(SAME, Narrowing(), SAME, SAME)([], X)),
        ("Layer 2 must give an output", lambda: block(SAME, SAME, SAME, lambda x: None)([], X)),
        ("layers must", lambda: AttnResBlock.final_read(4, 0, 2)),
    ],
    Full: [
        ("layers must", lambda: Full(4, 0)),
        ("width must", lambda: Full("4", 2)),
        ("embedding must be floating-point", lambda: Full(4, 2).open(X[0])),
        ("embedding must be floating-point", lambda: Full(4, 2).open(None)),
        ("embedding must have the width 5", lambda: Full(5, 2).open(X)),
        ("Layer 1 must give an output", lambda: Full(4, 2).open(X).write(X[:, :1])),
        ("layers is 1, and layer 2 writes", lambda: written(Full(4, 1), 2)),
    ],
    Block: [
        ("layers must", lambda: Block(4, 2.5, 1)),
        ("layers_per_block must", lambda: Block(4, 2, 0)),
        ("embedding must have the width 5", lambda: Block(5, 2, 2).open(X)),
        ("Layer 1 must give an output", lambda: Block(4, 2, 2).open(X).write(None)),
        ("layers is 1, and layer 2 writes", lambda: written(Block(4, 1, 1), 2)),
    ],
    DeepNorm: [("blocks must", lambda: DeepNorm(0))],
    TrainingConfig: [
        ("steps must", lambda: training(steps=0)),
        ("lr must", lambda: training(lr="x")),
        ("lr_end must", lambda: training(lr_end=NAN)),
        ("betas must", lambda: training(betas=(0.9, 1.0))),
        ("betas must", lambda: training(betas=0.9)),
        ("clip must", lambda: training(clip=0)),
        ("warmup must", lambda: training(warmup=None)),
        ("seed must", lambda: training(seed="x")),
        ("device must", lambda: training(device="gpu")),
        ("dtype must", lambda: training(dtype=["float32"])),
        ("compile must", lambda: training(compile="no")),
    ],
    Training: [
        ("decoder must be a DecoderConfig", lambda: Training({}, TrainingConfig(), CORPUS)),
        ("config must be a TrainingConfig", lambda: Training(config(), {}, CORPUS)),
        ("corpus must be a Corpus", lambda: Training(config(), TrainingConfig(), "text")),
    ],
    Corpus: [
        ("files must map", lambda: Corpus("a", {"a": "text"})),
        ("files must map", lambda: Corpus("a", ["text"])),
        ("path must", lambda: Corpus.from_path(None)),
        ("There is no file", lambda: Corpus.from_path("/nowhere/at/all")),
        ("batch must", lambda: CORPUS.train_batch(0, 0, 8)),
        ("context must", lambda: CORPUS.train_batch(0, 1, -3)),
        ("batches must", lambda: CORPUS.validation_batches(0, 1, 8)),
    ],
    convert: [
        ("model must be a Module", lambda: convert(None)),
        ("residual must", lambda: dit(["block"], 2)),
        ('residual must be "full" or "block"', lambda: dit("prenorm")),
        *(
            ("layers_per_block must be a whole number", partial(dit, "block", wrong))
            for wrong in (None, 0, 2.0)
        ),
        ("layers_per_block must be at most 4", lambda: dit("block", 5)),
        ("layers_per_block is for", lambda: dit("full", 2)),
        *(
            ("eps must be a number of at least 0", partial(dit, eps=wrong))
            for wrong in (INFINITE, -1e-6, "1e-6")
        ),
        ("weights must be a folder", lambda: dit(weights=3)),
        ("weights: no safetensors file", lambda: dit(weights="/nowhere/at/all")),
        ("example must", lambda: dit(example=5)),
        ("The model does not run on the example: TypeError", lambda: dit(example={"y": X})),
        ("The model does not run on the example: RuntimeError", lambda: dit(example=(X, X))),
        ("model must be the module itself", lambda: convert(torch.compile(DiT()), "full")),
        ("model must be the module itself, not under DataParallel", lambda: convert(nn.DataParallel(DiT()))),
        ("model must not be a Sequential", lambda: convert(nn.Sequential(DiT()), "full", example=X)),
        ("model must have values", lambda: convert(DiT().to("meta"), "full")),
        ("No transformer blocks were found in ReLU", lambda: convert(nn.ReLU(), "full", example=X)),
    ],
    revert: [
        ("The model was not converted", lambda: revert(None)),
        ("The model was not converted", lambda: revert(SAME)),
    ],
}
CASES = [
    pytest.param(says, call, id=f"{entry.__name__} {says}")
    for entry, cases in WRONG.items()
    for says, call in cases
]


@pytest.mark.parametrize(("says", "call"), CASES)
def test_it_is_one_sentence_that_names_what_is_wrong(says, call):
    with pytest.raises(ValueError, match=rf"^({says})[^\n]*\.$"):
        call()


def test_no_entry_point_is_left_out():
    takes_nothing = {PreNorm, PostNorm, Rescaled}
    public = {getattr(attnres, name) for name in attnres.__all__} - {attnres.ConversionError}
    assert public == WRONG.keys() | takes_nothing


def test_a_device_that_is_not_there_is_named():
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    with pytest.raises(ValueError, match=r"^device 'cuda' cannot be used here: [^\n]*\.$"):
        training(device="cuda")


def test_weights_of_part_of_a_model_may_still_be_taken_by_those_who_say_so():
    """The shared weights of a PreNorm model, into a Full one."""
    model, other = decoder(residual="full"), decoder()
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("residual.reads.") for name in missing)
    assert torch.equal(model.embedding.weight, other.embedding.weight)


def test_a_folder_may_be_a_path(tmp_path):
    with pytest.raises(ValueError, match=r"^weights: no safetensors file"):
        dit(weights=Path(tmp_path))
