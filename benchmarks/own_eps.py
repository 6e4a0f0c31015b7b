"""How far a converted model with zero queries is from the original at the eps its norms come with.

    python -m benchmarks.own_eps

prints the relative deviation of the logits for the tests' models: three blocks of width 16 with initial weights.
"""

import torch

import attnres
from tests.attnres.families import FAMILIES, logits_of

# The argument that names the eps, and the value that each family's library gives it.
OWN = {
    "Llama": ("rms_norm_eps", 1e-6),
    "Qwen": ("rms_norm_eps", 1e-6),
    "Mistral": ("rms_norm_eps", 1e-6),
    "GPT-2": ("layer_norm_epsilon", 1e-5),
    "DeepSeek-V3": ("rms_norm_eps", 1e-6),
    "Kimi Linear": ("rms_norm_eps", 1e-5),
    "ViT": ("layer_norm_eps", 1e-12),
    "DiT": ("eps", 1e-6),
}
RESIDUALS = {"Full": ("full", None), "Block of 2": ("block", 2)}


def deviation(name: str, residual: str, layers_per_block: int | None) -> float:
    """‖converted − original‖ / ‖original‖ of the logits, float32."""
    family = FAMILIES[name]
    argument, eps = OWN[name]
    model, inputs = family.seeded(**{argument: eps}).eval(), family.inputs()
    with torch.no_grad():
        before = logits_of(model(**inputs))
        attnres.convert(model, residual, layers_per_block, example=inputs, eps=1e-12)
        return ((logits_of(model.eval()(**inputs)) - before).norm() / before.norm()).item()


def main() -> None:
    print(f"torch {torch.__version__}\n\n| model | eps | {' | '.join(RESIDUALS)} |\n|---|---|---|---|")
    for name, (_, eps) in OWN.items():
        found = " | ".join(f"{deviation(name, *how):.1e}" for how in RESIDUALS.values())
        print(f"| {name} | {eps:.0e} | {found} |")


if __name__ == "__main__":
    main()
