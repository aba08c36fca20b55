"""Vision-OPD as a NeMo model: `training_step` is the algorithm (arXiv 2605.18740), everything else serves it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from megatron.core.process_groups_config import ProcessGroupCollection
from nemo.core import ModelPT
from omegaconf import OmegaConf
from torch import Tensor

from nemo_vopd.batch import MicroBatch, PromptBatch, Rollout, Sample, pack
from nemo_vopd.config import Config
from nemo_vopd.data.loader import PromptLoader, build_train_loader
from nemo_vopd.data.processor import Processor
from nemo_vopd.distill.fused import LossOptions, Policy, Sampled, fused_linear_jsd
from nemo_vopd.distill.teacher import Teacher
from nemo_vopd.distill.vocabulary import Vocabulary
from nemo_vopd.mcore import cpu, fp8, parallel
from nemo_vopd.mcore.optimizer import Optimizer, OptimizerFacade, learning_rate, wrap_ddp
from nemo_vopd.mcore.pipeline_passes import LossFunction, student_pass, teacher_pass
from nemo_vopd.mcore.sharded_state import Shards
from nemo_vopd.mcore.stage import Stage
from nemo_vopd.mcore.strategy import count_from
from nemo_vopd.mcore.teacher_weights import ShardedWeights
from nemo_vopd.rollout.build import EngineInputs, ServerPlace, build_engine
from nemo_vopd.rollout.engine import SamplingParams
from nemo_vopd.training.checkpoint import Checkpointer
from nemo_vopd.training.metrics import Reporter, Timers, step_sums
from nemo_vopd.training.stopping import FINISHED, RunControl
from nemo_vopd.vlm.build import build_twin, build_vlm, freeze, shape_of


class VisionOPDModel(ModelPT):
    """Student, teacher, optimizer and rollout engine of one rank, and the step that moves them."""

    def __init__(
        self,
        config: Config,
        groups: ProcessGroupCollection,
        trainer: Trainer | None = None,
        measure: Callable[[VisionOPDModel, int], dict[str, float]] | None = None,
    ) -> None:
        """Build everything from `config`; weights come from `config.model.hf_path`.

        `measure(model, step)` returns accuracies by name; it is called every `evaluation.every_n_steps` steps.
        """
        # ModelPT refuses a top-level key named model, so the run's configuration sits one level down
        super().__init__(OmegaConf.create({"run": dataclasses.asdict(config)}), trainer)  # type: ignore[arg-type]
        self.automatic_optimization = False
        self.config, self.groups = config, groups
        self.processor = Processor.from_pretrained(config.model.hf_path)
        self.shape = shape_of(config)

        self.student = build_vlm(config, groups)
        freeze(self.student, config.model.freeze)
        self.student_ddp = wrap_ddp(self.student.chunks, groups)
        self.student_optimizer = Optimizer(self.student_ddp, config.optimizer, groups, bf16=self.student.config.bf16)
        self.teacher_model, self.teacher = self._build_teacher()
        self.sampling_params = SamplingParams.of(config.rollout, self.processor, config.seed)
        folder = Path(config.exp_manager["exp_dir"])
        inputs = EngineInputs(self.student, groups, self.processor, self.sampling_params)
        place = ServerPlace(config.model.hf_path, folder, config.num_nodes)
        self.engine = build_engine(inputs, config.rollout, config.data, place, self._upcoming)
        self.timers, self.checkpointer, self.control = Timers(), Checkpointer(config), RunControl(config)
        self.reporter = Reporter(folder, groups, config.data.max_dropped_fraction, config.rollout.dump_path)
        self.measure = measure
        self._first_prompt = 0  # where the loader starts
        self._prompts: PromptLoader | None = None
        self._in_step = False  # a batch was taken and not trained on

    def training_step(self, dataloader_iter: Iterator) -> None:
        """One optimizer step on the next prompts: roll out, score twice, pull the student to the teacher."""
        step = self.trainer.global_step
        with self.timers("data"):
            batch: PromptBatch = next(dataloader_iter)[0]
            self._in_step = True

        # 1. The student, as the last step left it, answers from the full image (on-policy).
        with self.timers("sync"):
            self.engine.sync_weights()
        with self.timers("rollout"):
            rollouts = self.engine.generate(batch.samples)
            self.reporter.dump(rollouts, step)
            rollouts, unusable = self._drop_unusable(rollouts)
        students, teachers = self._microbatches(rollouts)

        # 2. The teacher reads the same responses beside the crop; only hidden states of response rows are kept.
        with self.timers("teacher"):
            offload = self.config.distill.teacher.offload
            teacher_hidden = teacher_pass(self.teacher_model, teachers, self.groups, offload)

        # 3. The student reads them beside the full image; the loss pulls it to the teacher, token by token.
        with self.timers("student"):
            self.student_optimizer.zero_grad()
            loss = self._loss(students, teacher_hidden)
            statistics = student_pass(self.student, self.student_ddp, students, loss, self.groups)
        metrics = self.reporter.reduce(statistics, rollouts, batch, unusable)
        self.control.check_mismatch(metrics)

        # 4. The student moves, then the teacher follows; without a token or a finite gradient neither does.
        with self.timers("optimizer"):
            lr = learning_rate(step, self.config.optimizer, self.config.trainer.max_steps)
            updated, grad_norm = self._update(metrics, lr)
            if updated:
                self.teacher.update(step)
            self.optimizers().step()  # type: ignore[union-attr]  # Lightning counts the step
            self._in_step = False

        self._report({"step": step, **metrics, "grad_norm": grad_norm, "lr": lr, "num_skipped_updates": 1 - updated})
        self.reporter.tell_dropped(step, metrics, batch, unusable)
        self.control.count_update(updated, metrics["num_response_tokens"], self.checkpointer.last)
        self.control.watch(metrics)

    def _update(self, metrics: dict, lr: float) -> tuple[bool, float]:
        """(whether the student moved, gradient norm); every rank sees the same numbers and does the same."""
        if not metrics["num_response_tokens"]:
            return False, 0.0
        if not math.isfinite(metrics["loss"]):
            return False, math.nan
        return self.student_optimizer.step(lr)

    def _loss(self, students: list[MicroBatch], teacher_hidden: list[Tensor]) -> LossFunction:
        """The loss function of `student_pass`: divergence sum, token count and statistics of one microbatch."""
        options, vocabulary = (
            LossOptions.of(self.config.distill, self.config.rollout.temperature),
            Vocabulary(self.groups.tp, self.student.vocab_size),
        )

        def loss(hidden: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
            batch, weight = students[index], self.student.output_weight()
            loss_sum, stats = fused_linear_jsd(
                Policy(hidden, weight),
                Policy(teacher_hidden[index].to(hidden.device), self.teacher_model.output_weight()),
                torch.ones_like(batch.rollout_log_probs),
                options,
                sampled=Sampled(batch.response_tokens, batch.rollout_log_probs),
                vocabulary=vocabulary,
                weight_grad_into=weight.main_grad if weight.requires_grad else None,  # type: ignore[attr-defined]
            )
            num_tokens = torch.full((), len(batch.response_tokens), dtype=torch.int, device=hidden.device)
            return loss_sum, num_tokens, step_sums(loss_sum, stats, batch.rollout_log_probs)

        return loss

    def _microbatches(self, rollouts: list[Rollout]) -> tuple[list[MicroBatch], list[MicroBatch]]:
        """Student and teacher microbatches over the same responses, both within the token budget."""
        # the interleaved schedule takes whole rounds of the pipeline
        rounds = self.config.parallel.pipeline if self.config.parallel.virtual_pipeline > 1 else 1
        budget, multiple = self.config.trainer.max_tokens_per_microbatch, fp8.token_multiple(self.student.config)
        both = pack(rollouts, budget, self.processor.pad_token_id, token_multiple=multiple, num_multiple=rounds)
        students, teachers = ([batch.to(cpu.device()) for batch in batches] for batches in both)
        return students, teachers

    def _drop_unusable(self, rollouts: list[Rollout]) -> tuple[list[Rollout], list[Rollout]]:
        """(usable, unusable) rollouts: a response with an image or video id could not be scored."""
        forbidden = torch.tensor(self.processor.forbidden_token_ids)
        parts: tuple[list[Rollout], list[Rollout]] = ([], [])
        for rollout in rollouts:
            parts[int(torch.isin(rollout.token_ids, forbidden).any())].append(rollout)
        return parts

    def _report(self, metrics: dict) -> None:
        """Write metrics.jsonl, TensorBoard and the progress line."""
        seconds = self.timers.pop()
        metrics = {**metrics, **seconds, "tokens_per_second": metrics["num_response_tokens"] / seconds["seconds_step"]}
        self.reporter.write("metrics", metrics)
        for name, value in metrics.items():
            if not isinstance(value, dict) and name != "step":  # loggers count steps themselves, as whole numbers
                shown = name in ("loss", "mean_response_length", "tokens_per_second")
                self.log(name, float(value), prog_bar=shown, rank_zero_only=True, batch_size=1)

    def _build_teacher(self) -> tuple[Stage, Teacher]:
        """The module that scores the crop view and the rule by which its weights follow."""
        options = self.config.distill.teacher
        if options.kind == "current":  # the live weights, read without gradient: no second copy
            return self.student, Teacher(options, {}, lambda shards: None)
        teacher_model = build_twin(self.student, self.config, self.groups).eval()
        weights = ShardedWeights(teacher_model, self.student, self.student_optimizer, self.groups)
        main = {name: shard for name, (shard, _) in weights.main.items()}
        return teacher_model, Teacher(options, main, weights.publish)

    def _upcoming(self) -> list[Sample]:
        """The samples of the next step, if there is one."""
        assert self._prompts is not None
        last = self.trainer.global_step + 1 >= self.config.trainer.max_steps
        return [] if last else self._prompts.peek().samples

    def train_dataloader(self) -> Iterator[PromptBatch]:
        """This data-parallel rank's prompts of each global batch, without end; the same iterator at every call."""
        if self._prompts is None:  # NeMo asks for it once more than Lightning
            arguments = self.config.data, self.config.distill.teacher_view, self.processor
            share = {"dp_rank": self.groups.dp_cp.rank(), "dp_size": self.groups.dp_cp.size()}
            where = {"seed": self.config.seed, "position": self._first_prompt}
            limit = 60 * self.config.parallel.timeout_minutes
            self._prompts = build_train_loader(*arguments, **share, **where, timeout_seconds=limit)
        return self._prompts

    def on_train_start(self) -> None:
        """Open the files, from the step the run starts at, and measure the starting point."""
        super().on_train_start()
        self.control.signals.listen()
        step = self.trainer.global_step
        self.reporter.open(step)
        self.control.write_status("running", step, self.checkpointer.last)
        self.timers = Timers()
        if step == 0:  # a checkpoint was measured before it was written
            self._evaluate(step)

    def on_train_end(self) -> None:
        """End the loader's processes; left to the interpreter's exit they take seconds."""
        super().on_train_end()
        assert self._prompts is not None
        self._prompts.close()

    def on_train_batch_end(self, outputs, batch, batch_idx: int, unused: int = 0) -> None:
        """Between two steps: measure accuracy where it is due, save, and stop when there is a reason to."""
        super().on_train_batch_end(outputs, batch, batch_idx, unused)
        step = self.trainer.global_step
        fp8.synchronize_scaling(self._scaling(), self.groups)
        self._evaluate(step)
        self.checkpointer.finish(wait=False)
        reason = self.control.stop_reason(step)
        to_resume = reason is not None and (self.config.checkpoint.every_n_steps > 0 or reason not in FINISHED)
        if to_resume or self.checkpointer.due(step):
            self.checkpointer.save(self, wait=reason is not None)
        if reason is not None:
            self.checkpointer.finish(wait=True)
            self.trainer.should_stop = True
        self.control.write_status(reason or "running", step, self.checkpointer.last)

    def _scaling(self) -> dict[str, Tensor]:
        """What delayed FP8 scaling remembers, live."""
        return fp8.scaling_state({"student": self.student, "teacher": self.teacher_model})

    def sharded_state(self) -> dict[str, Shards]:
        """The float32 tensors that survive a restart: student, both moments of Adam, teacher."""
        kinds = self.student_optimizer.state_shards(self.student)
        if self.teacher.shards:
            kinds["teacher"] = {name: (s, kinds["student"][name][1]) for name, s in self.teacher.shards.items()}
        return kinds

    def state(self) -> dict[str, Any]:
        """Everything else that survives a restart (generators are added by `Checkpointer`)."""
        assert self._prompts is not None
        again = self._prompts.batch_size if self._in_step else 0  # a batch that was taken and not trained on
        return {
            "step": self.trainer.global_step,
            "prompts": self._prompts.position - again,
            "num_updates": self.student_optimizer.num_updates,
            "ahead": parallel.gather_all(self.engine.pending(), self.groups.dp_cp),
            "scaling": fp8.gather(self._scaling(), self.groups),
            "reporter": self.reporter.state(),
            "control": self.control.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state` and from the tensors that were read into `sharded_state`."""
        self.student_optimizer.restored(state["num_updates"])
        self.teacher.restored()
        fp8.restore(self._scaling(), state["scaling"])
        self._first_prompt = state["prompts"]
        self.engine.restore(state["ahead"])
        self.reporter.restore(state["reporter"])
        self.control.restore(state["control"])
        count_from(self.trainer, state["step"])

    def _evaluate(self, step: int) -> None:
        every = self.config.evaluation.every_n_steps
        if self.measure is None or not every or step % every:
            return
        accuracies = self.measure(self, step)
        self.reporter.write("evaluations", {"step": step, **accuracies})
        self.control.watch(accuracies)
        self.timers.pop()  # evaluation is not part of the next step

    def configure_optimizers(self):
        """Lightning gets a facade that counts; Megatron's optimizer does the work."""
        return OptimizerFacade()

    def transfer_batch_to_device(self, batch, device, dataloader_idx: int):
        """Prompts stay on the CPU until they are packed into microbatches."""
        return batch

    def setup_training_data(self, train_data_config=None) -> None:
        """Required by ModelPT; the loader is built by `train_dataloader`."""

    def setup_validation_data(self, val_data_config=None) -> None:
        """Required by ModelPT; accuracy is measured by `_evaluate` in a run, and by recipes/evaluate.py."""

    @classmethod
    def list_available_models(cls):
        """Required by ModelPT: there are no pretrained models to list."""
        return []
