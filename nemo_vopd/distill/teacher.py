"""The teacher's weights: an average of the student's, in float32, on the shards the optimizer updates.

In bf16 an average at rate 0.05 and learning rate 2e-6 would lose 94% of the movement (docs/algorithm.md section 5),
so the average lives in float32 next to the optimizer's main weights and is cast for the forward pass. Memory: 4 bytes
for each parameter, divided by the data-parallel size, plus one copy of the weights in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_vopd.config import TeacherConfig


class Teacher:
    """Weights that score the crop view. Kinds: ema, fixed, current, periodic, trust_region."""

    def __init__(
        self,
        options: TeacherConfig,
        main: dict[str, Tensor],
        publish: Callable[[dict[str, Tensor]], None],
    ) -> None:
        """Start equal to the student.

        Args:
            options: `ema` moves by rate * (student - teacher) at each update; `periodic` copies the student at every
                `every`-th; `fixed` and `trust_region` keep the initial weights (trust_region mixes the student's
                logits in, in the loss); `current` has no weights of its own.
            main: this rank's float32 shards of the student's main weights, by parameter name; read at every update.
            publish: casts shards into the teacher model's weights and gathers them over data-parallel ranks.
        """
        self.options, self.main, self._publish = options, main, publish
        self.shards = {name: shard.detach().clone() for name, shard in main.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the student after its optimizer step `step` (0-based)."""
        options = self.options
        if options.kind == "ema":
            rate = options.rate
        elif options.kind == "periodic" and (step + 1) % options.every == 0:
            rate = 1.0
        else:
            return
        if self.shards:  # a rank may own no part of any parameter, and still takes part in publishing
            torch._foreach_lerp_(list(self.shards.values()), list(self.main.values()), rate)
        self._publish(self.shards)

    def restored(self) -> None:
        """After `shards` were filled in place from a checkpoint: publish them."""
        self._publish(self.shards)
