"""What a recording says about itself, each thing once: rows it never sees, streams that do not add up, odd forwards.

A tap that never fires would otherwise leave a blank that nobody notices.
"""

import logging

import numpy as np
import torch

from probes.compiled import advice
from probes.finite import first_place, not_finite
from probes.identity import first_broken, tolerance_of
from probes.sites import Sites
from probes.taps import Taps

log = logging.getLogger("depthscope")

_EXPLAINED = 0.999  # of a state, below which it is surely no mix of its sources

_LOOK = "`probes.describe(model)` shows where each is seen; `probes.mark` shows a tensor that no module does."


class SelfCheck:
    def __init__(self, sites: Sites):
        self._sites, self._layout = sites, sites.layout
        self._name = type(sites.root).__name__
        self._rows_checked = self._identity_checked = self._broken = False
        self._mixing_checked = self._final_told = False
        self._finite: int | None = None  # the latest step at which all was
        self._said: set[str] = set()
        self._wrong_reads: set[str] = set()  # labels
        for note in sites.found.notes if sites.found is not None else ():
            self._say(f"depthscope: {self._name}, whose depth reads were found by running it once: {note}.")

    def step(self, taps: Taps, reached: bool) -> None:
        """What was noticed in a step that was looked at, in whose backward passes gradients `reached` parameters."""
        if taps.seen and not reached:
            self._say(
                "depthscope saw no backward pass leave gradients on the parameters before a step, so that step has no "
                "gradient norms."
            )
        if not taps.seen:
            self._rows_checked = True
            self._say(
                f"depthscope saw no forward of {self._name} in training mode before a step. {self._advice('Train the very module that was passed, in training mode.')}"
            )
        if taps.finals.reason:
            self._final_told = True
            self._say(f"depthscope leaves the final state blank: {taps.finals.reason}.")
        if taps.masks.odd:
            self._say("depthscope takes masks of [B, T] only; here every token counts: pass mask=.")
        if taps.misplaced is not None:
            state = self._layout.states[taps.misplaced].replace("into", "state into")
            self._say(
                f"depthscope: what layers= and norms= name does not run in that order: the {state} comes when its layer has "
                "run. Rows of the two do not belong together, and no mixing is recovered."
            )
        if taps.torn:
            labels = {"state": self._layout.states, "output": self._layout.outputs}
            rows = ", ".join(labels[place][row] for place, row in sorted(taps.torn))
            self._say(
                f"depthscope leaves the gradients blank of {rows}: the compiler ends a graph within a layer that this goes by, and "
                "each graph sees a part of its gradient. torch.compile with fullgraph=True says where that is."
            )
        if taps.matrices and taps.edge_taps.unknown:
            text = (
                "depthscope leaves the depth attribution blank of what no RMSNorm or LayerNorm of its own feeds: "
                f"{', '.join(taps.edge_taps.unknown)}."
            )
            if text not in self._said:
                self._said.add(text)
                log.info("%s", text)  # nothing is wrong with that
        if taps.repeated:
            names = ", ".join(taps.repeated)
            self._say(
                f"depthscope saw layers run several times in one forward; their rows cover all runs: {names}."
            )

    def rows(self, seen: dict[str, np.ndarray]) -> None:
        """Which rows of the first recorded step were not observed; runs in the writer's thread."""
        if self._rows_checked or not seen:
            return
        self._rows_checked = True
        labels = {"hidden_rms": self._layout.states, "output_rms": self._layout.outputs}
        blank = {
            name: [label for label, n in zip(rows, seen[name], strict=True) if not n]
            for name, rows in labels.items()
        }
        if self._final_told:
            blank["hidden_rms"].remove(self._layout.states[-1])
        # As `describe` says.
        computed = {"hidden_rms": self._sites.computed_states, "output_rms": self._sites.computed_outputs}
        for name in ("hidden_rms", "output_rms"):
            gradients = name.replace("_rms", "_grad_rms")
            if gradients in seen:
                # A gradient comes from the end: where it has come to a row, it has passed all later ones.
                first = next((i for i, n in enumerate(seen[gradients]) if n), len(labels[name]))
                rows = list(enumerate(zip(labels[name], seen[name], seen[gradients], strict=True)))[first:]
                blank[gradients] = [
                    label
                    for row, (label, values, n) in rows
                    if values and not n and row not in computed[name]
                ]
        if any(blank.values()):
            rows = "; ".join(f"{name}: {', '.join(missing)}" for name, missing in blank.items() if missing)
            self._say(
                f"depthscope saw nothing of {rows}. They are blank as long as that is so. {self._advice(_LOOK)}"
            )

    def finite(self, step: int, values: dict, seen: dict[str, np.ndarray]) -> None:
        """The first layer and step at which values are not finite; runs in the writer's thread."""
        names = "hidden_rms", "output_rms"
        if self._broken or not all(name in seen and name in values for name in names):
            return
        place = first_place(self._layout, *(not_finite(values[name], seen[name]) for name in names))
        if not place:
            self._finite = step
            return
        self._broken = True
        since = ""
        if self._finite is not None and step - self._finite > 1:
            since = f" All was finite at step {self._finite}, the last recorded before."
        self._say(f"depthscope: at step {step} the {place} is not finite, the first seen in this run.{since}")

    def reads(self, errors: np.ndarray | None, weights: np.ndarray | None) -> None:
        """Found reads that were not computed, or whose weights do not give back the state; runs in the writer's
        thread."""
        if errors is None or weights is None:
            return
        first = self._layout.unpack(weights)[:, 0]
        rows = list(zip(self._layout.reads, errors, first, strict=True))
        bad = {read.label: error for read, error, weight in rows if error >= 0 and np.isnan(weight)}
        wrong = [f"{label} ({error:.1e})" for label, error in bad.items() if label not in self._wrong_reads]
        self._wrong_reads |= bad.keys()
        if wrong:
            self._say(
                "depthscope computes depth weights that do not give back the state, so those reads are blank: "
                f"{', '.join(wrong)}. docs/foreign-models.md says what may be the cause."
            )
        blank = [read.label for read, error, _ in rows if np.isnan(error)]
        if blank:
            self._say(
                f"depthscope saw nothing of the depth weights of {', '.join(blank)}. {self._advice(_LOOK)}"
            )

    def identity(self, errors: np.ndarray | None, about: np.ndarray | None) -> None:
        """Where the stream of a plain residual does not add up in a sample of tokens; runs in the writer's thread."""
        if self._identity_checked or errors is None or about is None or not self._sites.is_plain:
            return
        self._identity_checked = True
        row = first_broken(errors, float(tolerance_of(torch.from_numpy(about))))
        if row is not None:
            state = self._layout.states[row].replace("into", "state into")
            self._say(
                f"depthscope: the {state} of {self._name} is not the embedding plus the outputs before it (it differs "
                f"by {errors[row]:.1e}): the model mixes its layers otherwise. Outputs are recorded as the modules "
                "return them; `probes.describe(model)` shows which."
            )

    def mixing(self, solved: dict[str, np.ndarray]) -> None:
        """States that are no mix of the outputs that were seen, so that their weights are blank; runs in the writer's
        thread."""
        if self._mixing_checked or "mixing_r2" not in solved:
            return
        self._mixing_checked = True
        r2 = solved["mixing_r2"]
        few = [
            f"{label} ({r:.3f})" for label, r in zip(self._layout.states, r2, strict=True) if r < _EXPLAINED
        ]
        if not few:
            return
        text = (
            "depthscope: what was seen of the layers does not make up these states, so their mixing_weight is blank "
            f"(in brackets the part that it explains): {', '.join(few)}."
        )
        if self._sites.named:
            text += (
                " Something else is added too, or what layers= names is changed before it is added: "
                "`probes.describe(model)` finds layers by itself."
            )
            self._say(text)
        else:
            log.info("%s", text)  # a norm of the sum does that

    def _advice(self, otherwise: str) -> str:
        return advice(self._sites.root, otherwise)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)
