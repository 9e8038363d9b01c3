"""On-policy distillation: TRL's DistillationTrainer on a sparse student under a frozen teacher.

    loss = D(p_teacher, p_student)(token position), averaged over the completion tokens of the batch

Every completion is sampled from the student, so it learns from its own mistakes (Agarwal et al.
2023, arXiv 2306.13649). D is the generalized Jensen-Shannon divergence over the vocabulary; with
`beta` 0 it is KL(teacher || student), with 1, TRL's default, KL(student || teacher). No gradient
goes through the sampling.

TRL would prepare the teacher in the student's own layout. Here `teacher_placement.py` does, as in
grpo: `device` beside the student, also under ZeRO-3, or `zero3` in pieces on all ranks. The teacher
runs in each micro-batch of the loss, `per_device_train_batch_size` sequences at once.

Left out: a teacher in the host's memory, because TRL multiplies both heads on one device; tools.
"""

from torch import nn
from transformers import PreTrainedModel
from trl import DistillationConfig, DistillationTrainer

from pipeline.errors import UserError
from pipeline.training.sparse_trainer import SparseTrainer
from pipeline.training.teacher_placement import place_teacher


class OnPolicyTrainer(SparseTrainer, DistillationTrainer):
    """Distils a frozen teacher into a sparse student, on completions of the student."""

    def __init__(
        self,
        *,
        args: DistillationConfig,
        teacher: PreTrainedModel,
        teacher_placement: str = "device",
        **kwargs,
    ):
        """All arguments of `DistillationTrainer`, by name, and the teacher's.

        Args:
            args: TRL's.
            teacher: Frozen model with the student's vocabulary.
            teacher_placement: `device` or `zero3`, or `cpu` where the student is there too.
            **kwargs: As in `DistillationTrainer`, without `teacher_model`.

        Raises:
            UserError: The placement does not go with the device or the layout.
        """
        super().__init__(args=args, **kwargs)
        if teacher_placement == "cpu" and self.accelerator.device.type != "cpu":
            raise UserError(
                "teacher.placement: cpu: stage on_policy compares the whole distributions of "
                "student and teacher on one device; set device or zero3 instead"
            )
        self.teacher_model = place_teacher(teacher, teacher_placement, self.accelerator)
        if self.is_deepspeed_enabled and teacher_placement != "zero3":
            _say_that_it_is_whole(teacher.get_output_embeddings())

    def _compute_loss(self, *args):
        """TRL's, under the autocast that its way around the model's own forward loses."""
        with self.accelerator.autocast():
            return super()._compute_loss(*args)


def _say_that_it_is_whole(head: nn.Module) -> None:
    """Under ZeRO-3 TRL gathers both heads, and asks a teacher's for a status only pieces have."""
    from deepspeed.runtime.zero import partition_parameters  # deepspeed takes seconds

    for parameter in head.parameters():
        parameter.ds_status = partition_parameters.ZeroParamStatus.AVAILABLE
