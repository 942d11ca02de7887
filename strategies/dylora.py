"""DyLoRA: in each round the clients train the first b ranks of the adapter alone, with b drawn by the server.

Valipour, Rezagholizadeh, Kobyzev & Ghodsi, "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic
Search-Free Low-Rank Adaptation", EACL 2023, arXiv 2210.07558; by round, as in Xu, Saravanan, van Dalen, Mehmood, Tuckey
& Ozay, "DP-DyLoRA: Fine-Tuning Transformer-Based Models On-Device under Differentially Private Federated Learning using
Dynamic Low-Rank Adaptation", 2024, arXiv 2405.06368. The updates of a round are

    y = W x + scale * B[:, :b] A[:b] x,    r_min <= b <= r,

with A[:b] and B[:, :b] sent, trained and averaged as in ``fedavg``, while the ranks behind them stay as they were. So
the first ranks learn to do without the others: the trained adapter may be cut to any rank, without an SVD. The model is
measured and exported with all r of them.

The draw is the server's and by round, as in DP-DyLoRA, which has one rank for all clients of a round: it follows from
seed and round alone, so it is free under DP, and clip and noise are for the b ranks that are sent. DyLoRA itself draws
anew for each step. Here a step in which most ranks are masked would put noise on all of them, and shapes that change by
step would be compiled anew; by round there are r - r_min + 1 of them in a run. The papers' texts and code were not at
hand but for abstracts. What differs from what is told of them, as our choice:

- b is drawn without replacement, in a new order every r - r_min + 1 rounds, not independently: each rank is trained
  equally often, also in short runs, and the bytes of a cycle are known;
- the scale is alpha / r at all b, not alpha / b, so that a rank means the same in every round and cut;
- all of the first b ranks are trained, not the b-th alone (DyLoRA has both).

With ``dylora.min-rank = method.rank`` this is ``fedavg``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from fedlora.config import Config, Options, at_least, require
from fedlora.seeded import Seeded
from fedlora.strategy import Setting, Strategy


@final
@dataclass(frozen=True)
class DyLoraOptions(Options):
    """DyLoRA; read by ``strategy.name = 'dylora'`` only."""

    section: ClassVar[str] = "dylora"

    min_rank: int = 1
    """Least rank that a round may train; the most is ``method.rank``."""

    def __post_init__(self) -> None:
        """Check the fields."""
        at_least("dylora.min-rank", self.min_rank, 1)


@final
class DyLoRA(Strategy):
    """Trains and averages the first ranks of A and B, as many as are drawn for the round."""

    name = "dylora"
    methods = ("lora",)
    exact = False

    def __init__(self, setting: Setting) -> None:
        self._least = setting.config.options(DyLoraOptions).min_rank
        self.period = setting.whole - self._least + 1
        super().__init__(setting)

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a least rank above the adapter's."""
        least, most = config.options(DyLoraOptions).min_rank, config.method.rank
        require(least <= most, "dylora.min-rank", least, f"must be at most method.rank = {most}.")

    def rank(self, server_round: int, client: int | None = None) -> int:
        """Return the rank that is drawn for a round, the same for all clients."""
        cycle, turn = divmod(server_round - 1, self.period)
        order = Seeded(self.setting.config.seed).permutation("dylora", cycle, size=self.period)
        return self._least + int(order[turn])
