"""LISA: in each round a few of the model's blocks (transformer layers) are trained and sent, and all others wait.

Pan, Liu, Diao, Pi, Zhang, Han & Zhang, "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model
Fine-Tuning", NeurIPS 2024, arXiv 2403.17919. The paper trains whole weights on one machine: every K steps it draws
gamma of the L layers, all with the same probability, and trains these with embeddings and head. It was read in
summaries; of the authors' code (OptimalScale/LMFlow) what others have taken over from it. Here a method's tensors take
the place of weights, and a round that of K steps, all of it our choice:

- in a round the tensors of gamma blocks are trained, sent and averaged as in ``fedavg``; those of the others stay as
  the server has them, and clients compute with them. Bytes up fall to gamma / L, and under DP so do the numbers that
  clip and noise are for. An optimizer starts anew in each round, as everywhere here;
- all clients of a round train the same blocks: draws by client would leave each block to few of them;
- the blocks' order is drawn once from the run's seed, and rounds go through it again and again, gamma at a time, so
  that all blocks are trained equally often. Drawn anew by round, some would wait long: of 32 blocks at gamma = 2 one or
  two would not be trained in 50 rounds. No data has a part in the draw, so it is free under DP;
- what belongs to no one block is trained in every round, as the paper does with embeddings and head: adapted layers
  outside of blocks, and tensors that several blocks have in common. A method of which all is common has nothing to
  draw, and is refused (MoS, S2-LoRA, NOLA, Uni-LoRA).

With gamma = L this is ``fedavg``, to the bit. As there, means of A and B are not the mean of their products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

from fedlora.config import Options, require
from fedlora.seeded import Seeded
from fedlora.strategy import Setting, Strategy


@final
@dataclass(frozen=True)
class LisaOptions(Options):
    """LISA; read by ``strategy.name = 'lisa'`` only."""

    section: ClassVar[str] = "lisa"

    blocks: int = 2
    """Blocks (transformer layers) of the model that are trained in a round, 1 to 64."""

    def __post_init__(self) -> None:
        """Check the fields."""
        # A configuration is checked on 64 layers, before the model is known.
        require(1 <= self.blocks <= 64, "lisa.blocks", self.blocks, "must be from 1 to 64.")


@final
class Lisa(Strategy):
    """Trains and averages the tensors of some blocks in each round, in an order that the seed draws."""

    name = "lisa"
    methods = ("lora",)
    exact = False

    def __init__(self, setting: Setting) -> None:
        blocks = list(dict.fromkeys(spec.block for spec in setting.specs.values() if spec.block))
        if not blocks:
            raise ValueError(
                f"strategy {self.name!r}: no tensor of method {setting.config.method.name!r} on this model belongs to "
                "one block alone, so there is nothing to draw; choose a method with tensors of each layer, like 'lora'."
            )
        self._a_round = setting.config.options(LisaOptions).blocks
        rule = f"the model has {len(blocks)} blocks with adapted layers; with all of them this is 'fedavg'."
        require(self._a_round <= len(blocks), "lisa.blocks", self._a_round, rule)
        order = Seeded(setting.config.seed).permutation("blocks", size=len(blocks))
        self._order = [blocks[place] for place in order]
        self.period = len(blocks) // math.gcd(len(blocks), self._a_round)
        super().__init__(setting)

    def blocks(self, server_round: int) -> tuple[str, ...]:
        """Return the blocks whose turn it is; of two that are, the one comes first that was drawn first."""
        first = (server_round - 1) * self._a_round
        return tuple(self._order[number % len(self._order)] for number in range(first, first + self._a_round))
