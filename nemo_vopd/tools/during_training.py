"""What a run measures of itself: accuracy on both views while it trains, and the examples of its report."""

from __future__ import annotations

from pathlib import Path

from nemo_vopd.config import Config
from nemo_vopd.mcore import parallel
from nemo_vopd.model import VisionOPDModel
from nemo_vopd.rollout.native.engine import Decoder
from nemo_vopd.tools.evaluation.gap import measure_gap
from nemo_vopd.tools.report.examples import forget_examples, keep_replies, write_run_examples


class GapDuringTraining:
    """The regional-to-global gap on `evaluation.path`, every `evaluation.every_n_steps` steps."""

    def __init__(self, config: Config) -> None:
        """See `EvaluationConfig`."""
        self.options, self.folder = config.evaluation, Path(config.exp_manager["exp_dir"])

    def begin(self) -> None:
        """Remove the examples of an earlier run, which must not be taken for this one's."""
        if parallel.is_rank_zero():
            forget_examples(self.folder)

    def measure(self, model: VisionOPDModel, step: int) -> dict[str, float]:
        """Greedy accuracy of the student on both views, and the number of questions.

        The replies before the first step are kept, for the examples of the finished run's report.
        """
        assert self.options.path is not None  # validated
        config, rollout = model.config, model.config.rollout
        gap = measure_gap(
            Decoder(model.student, model.groups, rollout.max_batch_tokens),
            model.processor,
            self.options.path,
            config.data,
            model.groups,
            rollout.max_response_length,
            self.options.num_samples,
            option="evaluation.path",
        )
        if step == 0 and parallel.is_rank_zero():
            keep_replies(self.folder, gap.replies)
        accuracies = {"full_accuracy": gap.full_accuracy, "crop_accuracy": gap.crop_accuracy}
        return accuracies | {"num_samples": len(gap.replies)}

    def finish(self, model: VisionOPDModel) -> None:
        """Write examples.json."""
        write_run_examples(model)
