"""Read the outputs of matched blocks of teacher and student at the supervised positions, for a loss between them.

Shape letters: N supervised positions, S width of the student's blocks, D width of the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor, nn

from distillm_cli.losses.extra import TeacherPass
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.blocks import BlockOutputs, states_at, supervised_positions
from distillm_cli.types import Batch


class MatchedBlocks(TeacherPass):
    """Run the frozen teacher in the forward pass of ``StudentLoss``, and collect the outputs of both models' blocks.

    outputs, student_outputs: of the matched blocks, as many of each. Without blocks of the student nothing is collected.
    """

    def __init__(self, teacher: Backbone, outputs: BlockOutputs, student_outputs: BlockOutputs):
        super().__init__(teacher)
        self.outputs = outputs
        self.student_outputs = student_outputs
        self._teacher_states: list[Tensor] = []
        self._positions: list[Tensor] = []

    def train(self, mode: bool = True) -> MatchedBlocks:
        """Keep the teacher in evaluation mode: it is frozen."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def hidden(self, batches: SequenceOf[Batch]) -> Tensor:
        """Return the teacher's states. The student's pass over the same batches follows."""
        self.outputs.collects = bool(self.student_outputs.blocks)
        try:
            with torch.autocast(batches[0].ids_BT.device.type, enabled=False):
                hidden_ND = torch.cat([self.teacher.hidden(batch) for batch in batches])
            self._positions = [supervised_positions(self.teacher, batch) for batch in batches]
            self._teacher_states = [states_at(passes, self._positions) for passes in self.outputs.take() if passes]
        finally:
            self.outputs.collects = False
            self.outputs.take()
        self.student_outputs.attach()
        self.student_outputs.collects = True
        return hidden_ND

    def take_states(self) -> list[tuple[Tensor, Tensor]]:
        """Return for each pair of blocks the student's states [N, S] with their graph, and the teacher's [N, D].

        For use in ``loss``, which is called after the student's pass.
        """
        passes = self.student_outputs.take()
        self.student_outputs.remove()
        states = [states_at(of_block, self._positions) for of_block in passes]
        teacher_states, self._teacher_states = self._teacher_states, []
        return list(zip(states, teacher_states, strict=True))

    def release(self) -> None:
        self.student_outputs.remove()
        self.outputs.remove()
        self.teacher.forget_fast_paths()


def projections(count: int, widths: tuple[int, int], *, seed: int) -> nn.ModuleList:
    """Return linear maps between two widths. Their random weights do not depend on the state of the generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList([nn.Linear(*widths) for _ in range(count)])
